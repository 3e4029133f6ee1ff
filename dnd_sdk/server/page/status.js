/** The server itself: its models, slots and settings, and its counters with how fast they grow. */

import { KeyedList, byId, el, fill, setText } from "./dom.js";
import { count, duration, plain, plural } from "./format.js";
import { families, total } from "./metrics.js";
import { facts } from "./verdict.js";

const MOST_CELLS = 128;

/** What /dnd/status says. */
export function statusPanel() {
  let shown = "";
  return {
    show(status) {
      setText(byId("base-name"), status.base);
      setText(byId("slots-text"), slotsText(status.resident.length, status.n_slots));
      setText(byId("load-text"), `${count(status.running)} answering, ${count(status.waiting)} waiting`);
      setText(byId("uptime-text"), `up ${duration(status.uptime_s)}`);
      const lasting = JSON.stringify({ ...status, uptime_s: 0, running: 0, waiting: 0 });
      if (lasting === shown) return; // what the reader has selected stays so
      shown = lasting;
      drawSlots(byId("slots"), status.resident, status.n_slots ?? 0);
      fill(byId("status-facts"), facts(described(status)));
      fill(
        byId("status-settings"),
        facts(Object.entries(status.settings ?? {}).map(([name, value]) => [name, plain(value)])),
      );
    },
  };
}

/** A base that runs elsewhere has no slots of ours. */
function slotsText(resident, nSlots) {
  if (nSlots === null) return `${plural(resident, "adapter")} resident`;
  return `${resident} of ${count(nSlots)} slots hold an adapter`;
}

function described(status) {
  return [
    ["Base", status.base],
    ["Generator", plain(status.generator)],
    ["Encoder", status.encoder],
    ["Runs on", status.device && `${status.device}, ${status.dtype}`],
    ["Context", `${count(status.context_tokens)} tokens`],
    ["In slots", status.resident.join(", ") || "none"],
    ["Slow because", status.slow_because],
    ["Version", status.version],
  ];
}

/** A cell a slot, in the order of the list; of very many, a share. */
function drawSlots(node, resident, nSlots) {
  const cells = Math.min(nSlots, MOST_CELLS);
  const filled = nSlots > MOST_CELLS ? Math.ceil((resident.length / nSlots) * cells) : resident.length;
  const title = (i) => (nSlots > MOST_CELLS ? null : resident[i]);
  fill(
    node,
    Array.from({ length: cells }, (_, i) => el("i", { class: i < filled ? "filled" : null, title: title(i) })),
  );
}

/** What /metrics says, with the growth since it was read before. */
export function counters() {
  const list = new KeyedList(byId("counters-rows"), (family) => family.name, counterRow);
  return {
    show(text) {
      const found = families(text);
      byId("counters-empty").hidden = found.length > 0;
      list.show(found);
    },
  };
}

function counterRow() {
  let before = null;
  const [label, value, note] = [el("dt"), el("dd", { class: "value" }), el("dd", { class: "note" })];
  const node = el("div", {}, label, value, note);
  return {
    node,
    update(family) {
      const now = { at: performance.now(), ...total(family) };
      setText(label, family.help.replace(/\.$/, ""));
      label.title = family.name;
      setText(value, count(now.value));
      const seconds = before && (now.at - before.at) / 1000;
      const growing = family.type === "counter" && before && now.value > before.value;
      if (growing) setText(note, `${count((now.value - before.value) / seconds)}/s`);
      else setText(note, Number.isFinite(now.mean) ? `${duration(now.mean)} on average` : parts(family));
      before = now;
    },
  };
}

/** "prompt: 310, completion: 42": a family that is split, by the last of its labels. */
function parts(family) {
  const sums = new Map();
  for (const { labels, value } of family.samples) {
    const label = Object.values(labels).at(-1);
    if (label !== undefined && value) sums.set(label, (sums.get(label) ?? 0) + value);
  }
  return family.type === "histogram" ? "" : [...sums].map(([label, value]) => `${label}: ${count(value)}`).join(", ");
}
