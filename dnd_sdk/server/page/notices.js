/** What the page says in passing, and what it asks before it acts. */

import { byId, el, fill, setText } from "./dom.js";

const SHOWN_MS = 6000;

/** Say that something went well; it goes by itself, unless there are notes to be read. */
export function tell(text, notes = []) {
  const notice = add("notice", [text, ...notes].join("\n"), byId("notices"));
  if (!notes.length) setTimeout(() => notice.remove(), SHOWN_MS);
}

/** Say what went wrong, in the server's words; it stays until it is dismissed. */
export function complain(error) {
  if (error.name === "AbortError" || error.status === 401) return; // asked for, or asked about elsewhere
  add("notice error", worded(error), byId("alarms"));
}

/** An error in the server's words: what is wrong, and what to do. */
export function worded(error) {
  const advice = error.retryAfter ? `try again in ${error.retryAfter} s` : error.fix;
  return advice ? `${error.message}\n${advice}` : error.message;
}

/** Run `job` with a button out of use, unless it is so already. Resolves to whether it was run and went well. */
export async function during(button, job, failed = complain) {
  if (button.getAttribute("aria-disabled") === "true") return false;
  button.setAttribute("aria-disabled", "true"); // not `disabled`: that would drop the focus
  try {
    await job();
    return true;
  } catch (error) {
    failed(error);
    return false;
  } finally {
    button.removeAttribute("aria-disabled");
  }
}

/** Ask; resolves to whether the answer is yes. */
export function confirmed({ title, text, action }) {
  const dialog = byId("confirm");
  setText(byId("confirm-title"), title);
  fill(byId("confirm-text"), text);
  setText(byId("confirm-yes"), action);
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

function add(kind, text, place) {
  const close = el("button", { type: "button", class: "quiet", onclick: () => notice.remove() }, "Dismiss");
  const notice = el("div", { class: kind }, el("p", {}, text), close);
  place.append(notice);
  return notice;
}
