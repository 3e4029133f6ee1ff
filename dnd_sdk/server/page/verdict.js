/** What was decided, and why: the same picture for the tester, the log, and what an adaptation came to. */

import { el } from "./dom.js";
import { plural, score } from "./format.js";

const KNOWN = new Set(["reuse", "generate", "merge", "base"]);
const WIDTH = 100;

/** A decision as a coloured word; the word alone says it all. */
export function chip(decision) {
  return el("span", { class: `chip ${KNOWN.has(decision) ? decision : "base"}` }, decision);
}

/** A bar from 0 to 1, for the eye alone: the figure stands beside it. */
export function bar(value) {
  const shape = (kind, length) => {
    const line = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [name, v] of Object.entries({ class: kind, width: length, height: 4, rx: 2 }))
      line.setAttribute(name, v);
    return line;
  };
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const box = { class: "bar", viewBox: `0 0 ${WIDTH} 4`, preserveAspectRatio: "none", "aria-hidden": "true" };
  for (const [name, v] of Object.entries(box)) svg.setAttribute(name, v);
  const share = Math.min(1, Math.max(0, Number(value) || 0));
  svg.append(shape("track", WIDTH), shape("part", share * WIDTH));
  return svg;
}

/** The nearest adapters and their scores: `[{name, score}]`, or `[name, score]` pairs as the log has them. */
export function neighbours(found) {
  if (!found?.length) return null;
  const rows = found.map((one) => (Array.isArray(one) ? { name: one[0], score: one[1] } : one));
  return el(
    "ul",
    { class: "neighbours", "aria-label": "Nearest adapters" },
    rows.map((row) =>
      el(
        "li",
        {},
        el("span", { class: "name" }, row.name),
        bar(row.score),
        el("span", { class: "figure" }, score(row.score)),
      ),
    ),
  );
}

/** Pairs of a term and its value; those without a value are left out. */
export function facts(pairs) {
  const known = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return el(
    "dl",
    { class: "facts" },
    known.map(([term, value]) => el("div", {}, el("dt", {}, term), el("dd", {}, value))),
  );
}

/** All of it; `result` is what /dnd/route or /dnd/adapt answers. */
export function verdict(result) {
  const name = result.adapter?.name ?? result.adapter;
  return [
    el(
      "p",
      { class: "headline" },
      chip(result.decision),
      name ? el("span", { class: "name" }, name) : "the base model",
    ),
    result.reason && el("p", { class: "reason" }, result.reason),
    facts([
      ["Score", optional(result.score)],
      ["P(same job)", optional(result.probability)],
      ["P(a job at all)", optional(result.in_distribution)],
      ["Used", result.n_prompts && plural(result.n_prompts, "prompt")],
    ]),
    neighbours(result.neighbours),
    result.notes?.length
      ? el(
          "ul",
          { class: "notes" },
          result.notes.map((note) => el("li", {}, note)),
        )
      : null,
  ];
}

function optional(value) {
  return Number.isFinite(value) ? score(value) : null;
}
