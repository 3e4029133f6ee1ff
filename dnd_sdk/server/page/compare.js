/** One prompt, two answers side by side: streamed at the same time, with what each of them took. */

import { asError, getEvents } from "./api.js";
import { byId, el, fill, setText } from "./dom.js";
import { count, duration } from "./format.js";
import { worded } from "./notices.js";
import { chip } from "./verdict.js";

const BASE = "dnd:base";
const AUTO = "dnd:auto";

/** `answered()` is called when both answers are there. */
export function comparison({ answered }) {
  const form = byId("compare-form");
  const [prompt, limit, stop] = ["compare-prompt", "compare-limit", "compare-stop"].map(byId);
  const sides = [new Side(byId("side-left"), BASE), new Side(byId("side-right"), AUTO)];
  let running = null;

  const ask = async () => {
    if (running || !form.reportValidity()) return;
    running = new AbortController();
    stop.hidden = false;
    const body = {
      messages: [{ role: "user", content: prompt.value }],
      max_tokens: Number(limit.value),
      temperature: 0,
    };
    const told = await Promise.all(sides.map((side) => side.answer(body, running.signal)));
    if (document.activeElement === stop) prompt.focus();
    stop.hidden = true;
    running = null;
    setText(byId("compare-status"), told.join(" "));
    answered();
  };
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask();
  });
  stop.addEventListener("click", () => running?.abort());
  return {
    /** Offer these adapters to choose from. */
    offer: (names) => sides.forEach((side) => side.offer(names)),
    /** Put the base on the left and this adapter on the right; the next key typed is the prompt. */
    choose(name) {
      sides[0].choose(BASE);
      sides[1].choose(`dnd:${name}`);
      byId("compare").scrollIntoView({ block: "start" });
      prompt.focus({ preventScroll: true });
    },
  };
}

/** One of the two answers, and the model that gives it. */
class Side {
  constructor(root, model) {
    const part = (name) => root.querySelector(`.${name}`);
    [this.select, this.output, this.figures] = ["model", "answer", "figures"].map(part);
    this.model = model;
    this.offer([]);
    this.select.addEventListener("change", () => (this.model = this.select.value));
  }

  offer(names) {
    const values = [BASE, AUTO, ...names.map((name) => `dnd:${name}`)];
    const shown = [...this.select.options].map((option) => option.value);
    if (values.join("\n") !== shown.join("\n"))
      fill(
        this.select,
        values.map((v) => el("option", { value: v }, v)),
      );
    this.choose(values.includes(this.model) ? this.model : BASE);
  }

  choose(model) {
    this.model = model;
    this.select.value = model;
  }

  /** Stream one answer; resolves to a sentence about it, and never rejects. */
  async answer(body, signal) {
    const text = document.createTextNode("");
    fill(this.output, text);
    this.output.setAttribute("aria-busy", "true"); // read out when it is whole, not piece by piece
    const watch = new Watch((figures) => fill(this.figures, figures));
    const name = this.model.replace("dnd:", "");
    try {
      const json = { ...body, model: this.model, stream: true };
      for await (const { data } of getEvents("v1/chat/completions", { method: "POST", json, signal })) {
        if (data === "[DONE]") break;
        if (data.error) throw asError(data.error);
        text.appendData(watch.take(data));
      }
      return `${name}: ${watch.sentence()}`;
    } catch (error) {
      if (error.name === "AbortError") {
        watch.reason = "stopped";
        return `${name} was stopped.`;
      }
      this.output.append(el("p", { class: "problem" }, worded(error)));
      return `${name} failed.`;
    } finally {
      this.output.setAttribute("aria-busy", "false");
      watch.changed(watch.figures());
    }
  }
}

/** Times one stream and keeps what its chunks say of it. */
class Watch {
  constructor(changed) {
    Object.assign(this, {
      changed,
      started: performance.now(),
      first: null,
      last: null,
      usage: null,
      reason: null,
      dnd: null,
    });
    changed([el("span", {}, "waiting")]);
  }

  /** The text of a chunk. */
  take(chunk) {
    this.usage = chunk.usage ?? this.usage;
    this.dnd = chunk.dnd ?? this.dnd;
    const choice = chunk.choices?.[0];
    this.reason = choice?.finish_reason ?? this.reason;
    const text = choice?.delta?.content ?? "";
    if (text) {
      this.last = performance.now();
      if (this.first === null) {
        this.first = this.last;
        this.changed(this.figures());
      }
    }
    return text;
  }

  /** Tokens a second after the first; null for answers that are too short to tell. */
  speed() {
    const seconds = (this.last - this.first) / 1000;
    const tokens = (this.usage?.completion_tokens ?? 0) - 1;
    return tokens > 0 && seconds > 0 ? tokens / seconds : null;
  }

  sentence() {
    return `${count(this.usage?.completion_tokens)} tokens, the first after ${duration(this.wait())}.`;
  }

  /** Seconds to the first text; NaN while there is none. */
  wait() {
    return this.first === null ? NaN : (this.first - this.started) / 1000;
  }

  figures() {
    const pair = (value, label) => el("span", {}, el("b", {}, value), ` ${label}`);
    const [usage, speed] = [this.usage, this.speed()];
    return [
      this.dnd && el("span", {}, chip(this.dnd.decision ?? "base"), this.dnd.adapter && ` ${this.dnd.adapter}`),
      this.first !== null && pair(duration(this.wait()), "to first token"),
      speed && pair(count(speed), "tokens/s"),
      usage && pair(`${count(usage.prompt_tokens)} + ${count(usage.completion_tokens)}`, "tokens"),
      this.reason && el("span", {}, this.reason),
    ];
  }
}
