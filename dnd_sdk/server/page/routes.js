/** Where a text would go, and where the texts of late have gone. */

import { getJson } from "./api.js";
import { promptLines } from "./adapt.js";
import { KeyedList, byId, el, fill, setText } from "./dom.js";
import { clock, plural, score } from "./format.js";
import { during, worded } from "./notices.js";
import { bar, chip, facts, neighbours, verdict } from "./verdict.js";

/** The form that asks the router; nothing is changed by it. */
export function routeTester() {
  const [form, send, text, several, role, outcome] = ["form", "send", "text", "several", "role", "outcome"].map(
    (name) => byId(`route-${name}`),
  );
  const ask = async () => {
    const prompts = several.checked ? promptLines(text.value) : text.value;
    const json = role.value.trim() ? { prompts, role: role.value } : { prompts };
    fill(outcome, verdict(await getJson("dnd/route", { method: "POST", json })));
  };
  const failed = (error) => error.status !== 401 && fill(outcome, el("p", { class: "problem" }, worded(error)));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    during(send, ask, failed);
  });
}

/** The log of decisions, newest first; each unfolds into what it was made from. */
export function routeLog() {
  const list = new KeyedList(byId("log-rows"), (d) => `${d.time} ${d.kind} ${d.prompts}`, entry);
  return {
    show(decisions) {
      byId("log-empty").hidden = decisions.length > 0;
      list.show(decisions);
    },
  };
}

function entry() {
  const [time, target, figure] = [el("time"), el("span", { class: "name" }), el("span", { class: "figure" })];
  const [mark, line, kind, why] = ["mark", "line", "kind", "why"].map((name) => el("span", { class: name }));
  const details = el("div", { class: "details" });
  const node = el("li", {}, el("details", {}, el("summary", {}, time, kind, mark, target, why, line, figure), details));
  return {
    node,
    update(d) {
      if (time.dateTime === d.time) return; // a decision does not change
      [time.dateTime, time.title] = [d.time, d.time];
      setText(time, clock(d.time));
      setText(kind, d.kind);
      fill(mark, chip(d.decision));
      setText(target, d.adapter ?? "");
      setText(why, d.reason);
      fill(line, Number.isFinite(d.score) ? bar(d.score) : null);
      setText(figure, Number.isFinite(d.score) ? score(d.score) : "");
      fill(details, el("p", { class: "reason" }, d.reason), facts(grounds(d)), neighbours(d.neighbours));
    },
  };
}

function grounds(d) {
  const threshold = d.thresholds?.[d.rule === "single" ? "reuse_single" : "reuse"];
  const figure = (value) => (Number.isFinite(value) ? score(value) : null);
  return [
    ["Prompts", plural(d.n_prompts, "prompt")],
    ["Mode", d.mode],
    ["Settled by", d.by],
    ["Reused from", figure(threshold)],
    ["P(same job)", figure(d.probability)],
    ["P(a job at all)", figure(d.in_distribution)],
    ["Cluster", d.cluster],
  ];
}
