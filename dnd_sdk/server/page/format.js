/** Figures, sizes and times as people read them; a value that is missing is a dash. */

export const NONE = "–";
const COUNT = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const COMPACT = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const AGO = new Intl.RelativeTimeFormat("en", { numeric: "auto", style: "short" });
const STEPS = [
  [60, "second"],
  [60, "minute"],
  [24, "hour"],
  [Infinity, "day"],
];

/** 12,345 or 1.2M. */
export function count(value) {
  if (!Number.isFinite(value)) return NONE;
  return Math.abs(value) < 100_000 ? COUNT.format(value) : COMPACT.format(value);
}

/** "1 prompt", "3 prompts". */
export function plural(n, noun) {
  return `${count(n)} ${noun}${n === 1 ? "" : "s"}`;
}

/** 4.2 MB: decimal units. */
export function bytes(value) {
  if (!Number.isFinite(value)) return NONE;
  let size = value;
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (size < 1000) return `${size < 10 && unit !== "B" ? size.toFixed(1) : Math.round(size)} ${unit}`;
    size /= 1000;
  }
  return `${size.toFixed(1)} TB`;
}

/** 340 ms, 2.4 s, 12 min, 3 h 5 min. */
export function duration(seconds) {
  if (!Number.isFinite(seconds)) return NONE;
  if (seconds > 0 && seconds < 0.0001) return "<0.1 ms";
  if (seconds < 1) return `${seconds < 0.01 ? (seconds * 1000).toFixed(1) : Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} days`;
}

/** A similarity or a probability, three digits. */
export function score(value) {
  return Number.isFinite(value) ? value.toFixed(3) : NONE;
}

/** "5 min. ago". */
export function ago(iso) {
  const then = Date.parse(iso);
  if (!Number.isFinite(then)) return NONE;
  let value = Math.min(0, (then - Date.now()) / 1000);
  if (value > -5) return "now";
  for (const [size, unit] of STEPS) {
    if (-value < size) return AGO.format(Math.ceil(value), unit);
    value /= size;
  }
  return NONE;
}

/** The time of day, or the date of another day, in the reader's zone. */
export function clock(iso) {
  const then = new Date(iso);
  if (Number.isNaN(then.getTime())) return NONE;
  const today = then.toDateString() === new Date().toDateString();
  return today
    ? then.toLocaleTimeString("en-GB")
    : then.toLocaleDateString("en-GB", { day: "numeric", month: "short" });
}

/** Any JSON value in one line. */
export function plain(value) {
  if (value === null || value === undefined) return NONE;
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}
