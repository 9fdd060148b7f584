// How every part of the page formats numbers and makes elements.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const SUPERSCRIPT = "⁰¹²³⁴⁵⁶⁷⁸⁹";
export const NONE = "–";

/** @typedef {number | null | undefined} Maybe */

/** @param {string} text */
const minus = (text) => text.replace("-", "−");

/** @param {number} exponent */
const power = (exponent) =>
  "10" +
  (exponent < 0 ? "⁻" : "") +
  [...String(Math.abs(exponent))].map((digit) => SUPERSCRIPT[Number(digit)]).join("");

/**
 * Two or three significant digits, all digits of a whole number:
 * 12 345 · 123 · 1.23 · 0.012 · 1.2 × 10⁻⁵ · 1.
 * @param {Maybe} value
 */
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

/**
 * A whole number.
 * @param {Maybe} value
 */
export const count = (value) =>
  value === null || value === undefined
    ? NONE
    : minus(whole.format(value).replaceAll(",", "\u202f"));

/**
 * Seconds where there is little room: two significant digits.
 * @param {Maybe} value
 */
export const seconds = (value) =>
  value === null || value === undefined ? NONE : value < 0.01 ? "0" : String(+value.toPrecision(2));

/** @param {Maybe} value */
export const percent = (value) =>
  value === null || value === undefined
    ? NONE
    : `${(100 * value).toFixed(value > 0 && value < 0.0995 ? 1 : 0)}\u202f%`;

/** @param {number} seconds */
export function duration(seconds) {
  if (seconds < 60) return `${Math.max(1, Math.round(seconds))} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.round(hours / 24)} days`;
}

/**
 * The short label of a tick; on a logarithmic axis only powers of ten have one.
 * @param {number | null} value
 * @param {boolean} isLog
 */
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

/**
 * An element with properties, attributes and listeners (`on…`). Text is never parsed as HTML:
 * completions may contain anything.
 * @template {keyof HTMLElementTagNameMap} Tag
 * @param {Tag} tag
 * @param {Record<string, any>} properties
 * @param {(Node | string | false | null | undefined)[]} children
 */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && name !== "role") Object.assign(element, { [name]: value });
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(
    ...children.filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
}

/**
 * The elements of index.html that are more than an HTMLElement.
 * @typedef {object} Elements
 * @property {HTMLButtonElement} retry
 * @property {HTMLSelectElement} theme
 * @property {HTMLButtonElement} forget
 * @property {HTMLButtonElement} stop
 * @property {HTMLButtonElement} resume
 * @property {HTMLButtonElement} start
 * @property {HTMLProgressElement} bar
 * @property {HTMLButtonElement} unzoom
 * @property {HTMLInputElement} follow
 * @property {HTMLButtonElement} more
 * @property {HTMLDialogElement} key-dialog
 * @property {HTMLFormElement} key-form
 * @property {HTMLInputElement} key
 * @property {HTMLInputElement} remember
 * @property {HTMLDialogElement} start-dialog
 * @property {HTMLFormElement} start-form
 * @property {HTMLButtonElement} insert-example
 * @property {HTMLButtonElement} insert-current
 * @property {HTMLInputElement} file
 * @property {HTMLTextAreaElement} config
 * @property {HTMLButtonElement} start-now
 * @property {HTMLDialogElement} stop-dialog
 * @property {HTMLFormElement} stop-form
 * @property {HTMLButtonElement} stop-now
 */

/**
 * The element of index.html with this id.
 * @template {string} Id
 * @param {Id} id
 */
export const $ = (id) =>
  /** @type {Id extends keyof Elements ? Elements[Id] : HTMLElement} */ (
    document.getElementById(id)
  );
