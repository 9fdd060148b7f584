// @ts-check
// Numbers and elements: what every part of the page writes with.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const SUPERSCRIPT = "⁰¹²³⁴⁵⁶⁷⁸⁹";
export const NONE = "–";

const minus = (text) => text.replace("-", "−");
const power = (exponent) =>
  "10" +
  (exponent < 0 ? "⁻" : "") +
  [...String(Math.abs(exponent))].map((d) => SUPERSCRIPT[d]).join("");

/** Three digits that count, whatever the size: 12 345 · 123 · 1.23 · 0.012 · 1.2 × 10⁻⁵ · 1. */
export function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  const size = Math.abs(value);
  if (Number.isInteger(value)) return count(value);
  if (size < 0.001) {
    let exponent = Math.floor(Math.log10(size));
    let mantissa = (value / 10 ** exponent).toFixed(1);
    if (mantissa.endsWith("10.0"))
      [mantissa, exponent] = [mantissa.replace("10.0", "1.0"), exponent + 1];
    return minus(`${mantissa}\u202f×\u202f${power(exponent)}`);
  }
  if (size >= 1000) return count(value);
  if (size >= 100) return minus(value.toFixed(0));
  if (size >= 10) return minus(value.toFixed(1));
  return minus(value.toFixed(size >= 1 ? 2 : 3));
}

/** A whole number. */
export const count = (value) =>
  value === null || value === undefined
    ? NONE
    : minus(whole.format(value).replaceAll(",", "\u202f"));

/** Seconds where there is little room: two digits that count. */
export const seconds = (value) =>
  value === null || value === undefined ? NONE : value < 0.01 ? "0" : String(+value.toPrecision(2));

export const percent = (value) =>
  value === null || value === undefined
    ? NONE
    : `${(100 * value).toFixed(value > 0 && value < 0.0995 ? 1 : 0)}\u202f%`;

export function duration(seconds) {
  if (seconds < 60) return `${Math.max(1, Math.round(seconds))} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.round(hours / 24)} days`;
}

/** The label of a tick: short, and a power of ten where the axis is logarithmic. */
export function tick(value, isLog) {
  if (value === null) return "";
  if (isLog) {
    const exponent = Math.round(Math.log10(value));
    if (Math.abs(value / 10 ** exponent - 1) > 1e-6) return "";
    return exponent >= -2 && exponent <= 3 ? String(+value.toPrecision(2)) : power(exponent);
  }
  const size = Math.abs(value);
  if (size >= 1e6) return minus(`${+(value / 1e6).toPrecision(3)}M`);
  if (size >= 1e4) return minus(`${+(value / 1e3).toPrecision(3)}k`);
  if (size > 0 && size < 1e-3) return minus(value.toExponential(0));
  return minus(String(+value.toPrecision(4)));
}

/** An element; texts are never parsed as HTML, for completions may hold anything. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && name !== "role") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(
    ...children.filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
}

/**
 * The element of the page with this id; inputs, buttons and dialogs have their own properties.
 * @returns {any}
 */
export const $ = (id) => document.getElementById(id);
