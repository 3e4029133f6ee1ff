/** Prompts in, an adapter out: a file that is dropped or picked, or pasted lines, and the way there step by step. */

import { asError, getEvents } from "./api.js";
import { KeyedList, byId, el, fill, setText } from "./dom.js";
import { bytes, duration, plural } from "./format.js";
import { during, worded } from "./notices.js";
import { verdict } from "./verdict.js";

const STEPS = ["encode", "route", "generate", "validate", "store", "swap"];

/** `changed()` is called after an adaptation, `compare(name)` to compare its adapter with the base. */
export function adaptation({ changed, compare }) {
  const [form, start, pasted, outcome] = ["adapt-form", "adapt-start", "adapt-text", "adapt-outcome"].map(byId);
  const chosen = fileChoice();
  const progress = stepList(byId("adapt-steps"));
  pasted.addEventListener("input", () => setText(byId("adapt-n"), noted(promptLines(pasted.value))));

  const run = async () => {
    const body = asked(form, chosen.file(), promptLines(pasted.value));
    fill(outcome);
    progress.begin();
    const result = await adapted(body, progress);
    progress.end(result.timings_s);
    const name = result.adapter?.name;
    const beside = name && el("button", { type: "button", onclick: () => compare(name) }, "Compare with the base");
    fill(outcome, verdict(result), beside);
  };
  const failed = (error) => {
    progress.fail();
    if (error.status !== 401) fill(outcome, el("p", { class: "problem" }, worded(error)));
  };
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (await during(start, run, failed)) changed();
  });
}

/** The lines that are prompts. */
export function promptLines(text) {
  return text
    .split("\n")
    .map((line) => line.trim())
    .filter(Boolean);
}

function noted(prompts) {
  return prompts.length ? plural(prompts.length, "prompt") : "";
}

/** The body of the request: a form where there is a file, else JSON. */
function asked(form, file, prompts) {
  const fields = [...new FormData(form)].filter(([, value]) => typeof value === "string" && value.trim());
  if (!file) {
    const own = fields.filter(([name]) => !["column", "field"].includes(name));
    return { json: { prompts, ...Object.fromEntries(own) } };
  }
  const data = new FormData();
  for (const [name, value] of fields) data.append(name, value);
  data.append("file", file);
  return { form: data };
}

async function adapted(body, progress) {
  for await (const { event, data } of getEvents("dnd/adapt", { method: "POST", ...body })) {
    if (event === "step") progress.reach(data.step);
    else if (event === "error") throw asError(data.error);
    else if (event === "result") return data;
  }
  throw asError({ message: "The connection broke off before the result." });
}

/** The file to adapt to: dropped on the form or picked, until it is taken away again. */
function fileChoice() {
  const [input, zone, label, away, paste] = [
    "adapt-file",
    "adapt-zone",
    "adapt-file-name",
    "adapt-away",
    "adapt-paste",
  ].map(byId);
  let file = null;
  const choose = (next) => {
    file = next;
    setText(label, file ? `${file.name}, ${bytes(file.size)}` : "Drop a prompt file here, or pick one");
    zone.classList.toggle("chosen", file !== null);
    [away.hidden, paste.hidden, byId("adapt-kinds").hidden] = [!file, Boolean(file), Boolean(file)];
    byId("adapt-text").required = !file;
    byId("adapt-column").hidden = !file?.name.toLowerCase().endsWith(".csv");
    byId("adapt-field").hidden = !file?.name.toLowerCase().endsWith(".jsonl");
  };
  input.addEventListener("change", () => choose(input.files[0] ?? null));
  away.addEventListener("click", () => {
    input.value = "";
    choose(null);
    input.focus();
  });
  for (const kind of ["dragover", "drop"]) {
    // anywhere on the page: a file that misses the zone must not replace the page
    document.addEventListener(kind, (event) => event.preventDefault());
  }
  document.addEventListener("dragover", () => zone.classList.add("over"));
  for (const kind of ["dragleave", "drop"]) {
    document.addEventListener(
      kind,
      (event) => (kind === "drop" || !event.relatedTarget) && zone.classList.remove("over"),
    );
  }
  document.addEventListener("drop", (event) => event.dataTransfer.files[0] && choose(event.dataTransfer.files[0]));
  choose(null);
  return { file: () => file };
}

/** The steps of an adaptation: to come, at work, done, or left out. */
function stepList(node) {
  let steps = [];
  const list = new KeyedList(node, (step) => step.name, stepRow);
  const draw = () => list.show(steps);
  const finish = (state) => {
    for (const step of steps) if (step.state === "at work") step.state = state;
  };
  return {
    begin() {
      steps = STEPS.map((name) => ({ name, state: "to come" }));
      node.hidden = false;
      draw();
    },
    reach(name) {
      if (!steps.some((step) => step.name === name)) steps.push({ name });
      finish("done");
      steps.find((step) => step.name === name).state = "at work";
      draw();
    },
    end(seconds = {}) {
      for (const step of steps) {
        step.seconds = seconds[step.name];
        step.state = step.seconds || step.state === "at work" ? "done" : "left out";
      }
      draw();
    },
    fail() {
      finish("failed");
      draw();
    },
  };
}

function stepRow() {
  const [state, time] = [el("span", { class: "visually-hidden" }), el("span", { class: "figure" })];
  const name = el("span");
  const node = el("li", {}, name, state, time);
  return {
    node,
    update(step) {
      setText(name, step.name);
      node.className = step.state.replace(" ", "-");
      setText(state, `: ${step.state}`);
      setText(time, step.seconds ? duration(step.seconds) : "");
    },
  };
}
