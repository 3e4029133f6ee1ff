/** The text that Prometheus reads, as families of samples. */

const LINE = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/;
const NOT_OURS = /^(python|process)_|_created$/;
const LABEL = /([A-Za-z_]\w*)="((?:\\.|[^"\\])*)"/g;
const ESCAPED = { n: "\n", '"': '"', "\\": "\\" };

/** Families in the order of the text: `{name, help, type, samples: [{name, labels, value}]}`. */
export function families(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const comment = /^# (HELP|TYPE) (\S+) (.*)$/.exec(line);
    if (comment) {
      const [, kind, name, rest] = comment;
      if (kind === "HELP") found.set(name, { name, help: rest, type: "untyped", samples: [] });
      else if (found.has(name)) found.get(name).type = rest;
      continue;
    }
    const match = LINE.exec(line);
    if (!match) continue;
    const [, name, labels = "", value] = match;
    family(found, name)?.samples.push({ name, labels: labelled(labels), value: number(value) });
  }
  return [...found.values()].filter((f) => f.samples.length && !NOT_OURS.test(f.name));
}

/** What a family comes to: a histogram's count and mean, else the sum of its samples. */
export function total(family) {
  const sum = (name) => family.samples.filter((s) => !name || s.name === name).reduce((all, s) => all + s.value, 0);
  if (family.type !== "histogram" && family.type !== "summary") return { value: sum() };
  const n = sum(`${family.name}_count`);
  return { value: n, mean: n ? sum(`${family.name}_sum`) / n : null };
}

function family(found, sample) {
  return found.get(sample) ?? found.get(sample.replace(/_(bucket|sum|count|total)$/, ""));
}

function labelled(text) {
  const pairs = [...text.matchAll(LABEL)].map(([, name, value]) => [
    name,
    value.replace(/\\(.)/g, (_, c) => ESCAPED[c] ?? c),
  ]);
  return Object.fromEntries(pairs);
}

function number(text) {
  return text === "+Inf" ? Infinity : Number(text);
}
