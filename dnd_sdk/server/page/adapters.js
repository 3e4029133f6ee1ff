/** The stored adapters: what they are, whether they sit in a slot, and what can be done with them. */

import { getJson } from "./api.js";
import { KeyedList, byId, el, setText } from "./dom.js";
import { ago, bytes, count, plural } from "./format.js";
import { confirmed, during, tell } from "./notices.js";

const MOST_ROWS = 200;

/** `changed()` is called after this table has changed something, `compare(name)` to compare one with the base. */
export function adaptersTable({ changed, compare }) {
  let all = [];
  const filter = byId("adapters-filter");
  const list = new KeyedList(
    byId("adapters-rows"),
    (adapter) => adapter.name,
    () => row({ changed, compare }),
  );

  const draw = () => {
    const wanted = filter.value.trim().toLowerCase();
    const matching = all.filter((a) => `${a.name}\n${a.role ?? ""}\n${a.source}`.toLowerCase().includes(wanted));
    list.show(matching.slice(0, MOST_ROWS));
    byId("adapters-empty").hidden = all.length > 0;
    byId("adapters-table").hidden = !matching.length;
    byId("adapters-filter-box").hidden = all.length < 6;
    setText(byId("adapters-note"), noted(matching.length, all.length));
  };
  filter.addEventListener("input", draw);
  return {
    show(adapters) {
      all = [...adapters].sort(
        (a, b) => (b.created ?? "").localeCompare(a.created ?? "") || a.name.localeCompare(b.name),
      );
      setText(byId("adapters-count"), all.length ? count(all.length) : "");
      draw();
    },
  };
}

function noted(matching, stored) {
  if (matching > MOST_ROWS) return `The newest ${MOST_ROWS} of ${count(matching)}; filter to see others.`;
  return matching === stored ? "" : `${count(matching)} of ${plural(stored, "adapter")} match.`;
}

function row({ changed, compare }) {
  let current;
  const [name, about, role] = [
    el("span", { class: "name" }),
    el("span", { class: "about" }),
    el("span", { class: "about" }),
  ];
  const cells = Object.fromEntries(["Size", "Hits", "Last used"].map((label) => [label, figureCell(label)]));
  const states = el("td", { role: "cell", class: "states" });
  const resident = el("span", { class: "state resident" }, "resident");
  const pinned = el("span", { class: "state pinned" }, "pinned");
  states.append(resident, pinned);
  const beside = el("button", { type: "button", class: "quiet", onclick: () => compare(current.name) }, "Compare");
  const pin = el("button", { type: "button", class: "quiet", onclick: () => togglePin(pin, current, changed) });
  const remove = el(
    "button",
    { type: "button", class: "quiet danger", onclick: () => erase(remove, current, changed) },
    "Delete",
  );
  const node = el(
    "tr",
    { role: "row" },
    el("th", { scope: "row", role: "rowheader" }, name, about, role),
    Object.values(cells),
    states,
    el("td", { role: "cell", class: "actions" }, beside, pin, remove),
  );
  return {
    node,
    update(adapter) {
      current = adapter;
      setText(name, adapter.name);
      setText(role, adapter.role ?? "");
      role.title = adapter.role ?? "";
      setText(about, described(adapter));
      about.title = adapter.created ?? "";
      setText(cells.Size, bytes(adapter.bytes));
      setText(cells.Hits, count(adapter.hits));
      setText(cells["Last used"], adapter.last_used ? ago(adapter.last_used) : "not yet");
      cells["Last used"].title = adapter.last_used ?? "since the server started";
      [resident.hidden, pinned.hidden] = [!adapter.resident, !adapter.pinned];
      setText(pin, adapter.pinned ? "Unpin" : "Pin");
      for (const button of [beside, pin, remove])
        button.setAttribute("aria-label", `${button.textContent} ${adapter.name}`);
    },
  };
}

function figureCell(label) {
  const cell = el("td", { role: "cell" });
  cell.dataset.label = label; // shown beside the figure where the head of the table has no room
  return cell;
}

/** "generated from 40 prompts", "imported from trl". */
function described(adapter) {
  const from = [adapter.origin, adapter.n_prompts && plural(adapter.n_prompts, "prompt")].filter(Boolean).join(", ");
  return from ? `${adapter.source} from ${from}` : adapter.source;
}

async function togglePin(button, adapter, changed) {
  const method = adapter.pinned ? "DELETE" : "PUT";
  if (!(await during(button, () => getJson(`dnd/adapters/${encodeURIComponent(adapter.name)}/pin`, { method }))))
    return;
  tell(adapter.pinned ? `${adapter.name} is no longer pinned.` : `${adapter.name} stays in its slot.`);
  changed();
}

async function erase(button, adapter, changed) {
  const text = [
    "The adapter ",
    el("span", { class: "name" }, adapter.name),
    " leaves its slot and the store, for good.",
  ];
  if (!(await confirmed({ title: "Delete this adapter?", text, action: "Delete" }))) return;
  const path = `dnd/adapters/${encodeURIComponent(adapter.name)}`;
  if (!(await during(button, () => getJson(path, { method: "DELETE" })))) return;
  tell(`${adapter.name} is deleted.`);
  byId("adapters-title").focus(); // the button that had it goes with its row
  changed();
}
