// The curves: one uPlot per chart, drawn from the history, only while it is in view and at most
// once per animation frame.

import uPlot from "./vendor/uPlot.esm.js";
import { $, NONE, count, h, number, percent, seconds, tick } from "./text.js";

/**
 * @import { ColumnName, History, Range } from "./history.js"
 * @import { Maybe } from "./text.js"
 *
 * @typedef {object} Line
 * @property {ColumnName} name
 * @property {string} label
 * @property {string} colour a custom property of style.css
 * @property {boolean} [dots] single values, joined by a dashed line
 * @property {ColumnName} [when] hides the line unless this column has values
 *
 * @typedef {object} Spec
 * @property {string} title
 * @property {string} unit
 * @property {"hero"} [shape]
 * @property {Line[]} lines
 * @property {[high: ColumnName, low: ColumnName]} [band]
 * @property {boolean} [log] logarithmic axis
 * @property {boolean} [zero] the axis starts at 0
 * @property {boolean} [percent] values in [0, 1]
 * @property {(value: Maybe) => string} [format]
 * @property {ColumnName} [when] hides the chart unless this column has values
 *
 * @typedef {(number | null)[]} Values of one line, by index; null where there is none
 */

const POINTS_PER_PIXEL = 2;

/** @type {(name: ColumnName, label: string, colour: string, more?: Partial<Line>) => Line} */
const line = (name, label, colour, more = {}) => ({ name, label, colour, ...more });
const dots = { dots: true };

/**
 * In the order of the page.
 * @type {Spec[]}
 */
const CHARTS = [
  {
    title: "Reward",
    unit: "mean ± std of a step",
    shape: "hero",
    band: ["reward_high", "reward_low"],
    lines: [
      line("reward_mean", "mean", "--s1"),
      line("eval_sampled", "eval sampled", "--s2", dots),
      line("eval_greedy", "eval greedy", "--s3", dots),
    ],
  },
  {
    title: "KL",
    unit: "nats per token",
    log: true,
    lines: [
      line("sampler_kl", "sampler to policy", "--s1", { when: "sampler_kl" }),
      line("stale_kl", "older versions", "--s3", { when: "stale_kl" }),
      line("reference_kl", "policy to reference", "--s2", { when: "reference_kl" }),
    ],
  },
  {
    title: "Logprob gap",
    unit: "nats, policy to sampler",
    log: true,
    when: "logprob_gap",
    lines: [
      line("logprob_gap", "mean", "--s1"),
      line("logprob_gap_p99", "p99", "--s2"),
      line("logprob_gap_max", "max", "--s4"),
    ],
  },
  {
    title: "Staleness",
    unit: "versions",
    zero: true,
    lines: [line("staleness_mean", "mean", "--s1"), line("staleness_max", "max", "--s2")],
  },
  {
    title: "Throughput",
    unit: "completion tokens per s",
    zero: true,
    lines: [line("tokens_per_s", "whole step", "--s1")],
  },
  {
    title: "Idle",
    unit: "share of the step",
    percent: true,
    lines: [
      line("trainer_idle_fraction", "trainer", "--s1"),
      line("rollout_idle_fraction", "replicas", "--s2"),
    ],
  },
  {
    title: "Time",
    unit: "s per step",
    zero: true,
    format: seconds,
    lines: [
      line("step_s", "step", "--s1"),
      line("wait_s", "wait", "--s2"),
      line("update_s", "update", "--s3"),
      line("sync_s", "sync", "--s4"),
    ],
  },
  {
    title: "Loss",
    unit: "",
    lines: [
      line("loss", "loss", "--s1"),
      line("value_loss", "value", "--s2", { when: "value_loss" }),
    ],
  },
  {
    title: "Gradient norm",
    unit: "before clipping",
    zero: true,
    lines: [line("grad_norm", "norm", "--s1")],
  },
  {
    title: "Entropy",
    unit: "nats per token",
    zero: true,
    lines: [line("entropy", "entropy", "--s1")],
  },
  {
    title: "Completion length",
    unit: "tokens",
    zero: true,
    lines: [line("completion_tokens_mean", "mean", "--s1")],
  },
  {
    title: "Lost signal",
    unit: "share",
    percent: true,
    lines: [
      line("constant_fraction", "equal rewards", "--s1"),
      line("truncated_fraction", "truncated", "--s2"),
    ],
  },
  {
    title: "Effective sample size",
    unit: "share",
    percent: true,
    lines: [line("token_ess", "tokens", "--s1"), line("sequence_ess", "completions", "--s2")],
  },
  {
    title: "Explained variance",
    unit: "of the critic",
    when: "explained_variance",
    lines: [line("explained_variance", "share", "--s1")],
  },
  {
    title: "Preference",
    unit: "accuracy",
    percent: true,
    when: "preference_accuracy",
    lines: [line("preference_accuracy", "accuracy", "--s1")],
  },
  {
    title: "Preference margin",
    unit: "nats",
    when: "preference_margin",
    lines: [line("preference_margin", "margin", "--s1")],
  },
];

/** @type {HTMLElement | undefined} */
let probe;

/**
 * The current colour of a custom property; the browser resolves its light-dark().
 * @param {string} property
 */
function colour(property) {
  probe ??= document.body.appendChild(h("i", { className: "hidden", ariaHidden: "true" }));
  probe.style.color = `var(${property})`;
  return getComputedStyle(probe).color;
}

class Chart {
  /**
   * @param {Spec} spec
   * @param {Curves} curves
   */
  constructor(spec, curves) {
    this.spec = spec;
    this.curves = curves;
    /** @type {uPlot | undefined} */
    this.uplot = undefined;
    this.isInView = false;
    this.isDue = true;
    this.step = h("span", { className: "at" });
    this.values = spec.lines.map((item) => {
      const swatch = h("i", { className: item.dots ? "dashed" : "", ariaHidden: "true" });
      swatch.style.borderTopColor = `var(${item.colour})`;
      const value = h("b", {}, NONE);
      return { item, value, entry: h("span", {}, swatch, `${item.label} `, value) };
    });
    this.plot = h("div", { className: "plot" });
    this.element = h(
      "figure",
      {
        className: `chart ${spec.shape ?? ""}`,
        tabIndex: 0,
        role: "group",
        onkeydown: (/** @type {KeyboardEvent} */ event) => this.#key(event),
        onblur: () => this.#point(null),
        ariaLabel: `${spec.title}, ${spec.unit || "by step"}`,
      },
      h(
        "figcaption",
        {},
        h(
          "div",
          { className: "chart-head" },
          h("b", {}, spec.title),
          h("span", {}, spec.unit),
          this.step,
        ),
        h("div", { className: "legend" }, ...this.values.map((value) => value.entry)),
      ),
      this.plot,
    );
    this.format = spec.format ?? (spec.percent ? percent : number);
  }

  get names() {
    return [...this.spec.lines.map((item) => item.name), ...(this.spec.band ?? [])];
  }

  /** @param {History} history */
  draw(history) {
    const { spec } = this;
    this.isDue = false;
    this.element.hidden = Boolean(spec.when && !history.has(spec.when));
    if (this.element.hidden) return;
    for (const { item, entry } of this.values) {
      entry.hidden = Boolean(item.when && !history.has(item.when));
    }
    const width = this.plot.clientWidth;
    const height = this.plot.clientHeight;
    if (!width) return;
    const [steps, ...columns] = history.points(
      this.names,
      this.curves.range,
      POINTS_PER_PIXEL * width,
    );
    /** @type {[steps: number[], ...lines: Values[]]} */
    const data = [
      steps,
      ...columns.map((column, index) => {
        if (this.values[index]?.entry.hidden) return column.map(() => null);
        return spec.log ? column.map((value) => (value && value > 0 ? value : null)) : column;
      }),
    ];
    if (!this.uplot) this.uplot = new uPlot(this.#options(width, height), data, this.plot);
    else {
      if (this.uplot.width !== width || this.uplot.height !== height)
        this.uplot.setSize({ width, height });
      this.uplot.setData(data);
    }
    this.#read();
  }

  recolour() {
    this.uplot?.redraw(false);
  }

  /**
   * @param {number} width
   * @param {number} height
   * @returns {uPlot.Options}
   */
  #options(width, height) {
    const { spec, curves } = this;
    /** @type {uPlot.Axis} */
    const axis = {
      stroke: () => colour("--soft"),
      font: `11px ${getComputedStyle(document.body).fontFamily}`,
      ticks: { show: false },
      gap: 6,
    };
    /** @type {uPlot.Series[]} */
    const series = this.spec.lines.map((item) => ({
      stroke: () => colour(item.colour),
      width: item.dots ? 1 : 1.5,
      dash: item.dots ? [2, 3] : undefined,
      spanGaps: true,
      points: item.dots
        ? { show: true, size: 6, fill: () => colour(item.colour) }
        : { show: alone },
    }));
    const [high, low] = [series.length + 1, series.length + 2];
    /** @type {uPlot.Series} */
    const edge = { stroke: "transparent", width: 0, points: { show: false } };
    const edges = spec.band ? [{ ...edge }, { ...edge }] : [];
    return {
      width,
      height,
      legend: { show: false },
      padding: [6, 9, 0, 0],
      scales: {
        x: { time: false, range: (_, min, max) => stepRange(curves, min, max) },
        y: spec.log
          ? { distr: 3, range: (_, min, max) => logRange(min, max) }
          : { range: (_, min, max) => linearRange(spec, min, max) },
      },
      axes: [
        {
          ...axis,
          size: 22,
          grid: { show: false },
          space: 56,
          incrs: STEP_INCREMENTS,
          values: (_, ticks) => ticks.map((value) => tick(value, false)),
        },
        {
          ...axis,
          space: 30,
          grid: {
            stroke: () => colour("--grid"),
            width: 1,
            filter: (_, ticks) => ticks.map((v) => (spec.log && !tick(v, true) ? null : v)),
          },
          size: (u, values) => 10 + 6.6 * Math.max(2, ...(values ?? []).map((v) => v.length)),
          values: (_, ticks) =>
            ticks.map((v) =>
              v === null
                ? ""
                : spec.percent
                  ? `${Math.round(100 * v)}\u202f%`
                  : tick(v, Boolean(spec.log)),
            ),
        },
      ],
      series: [{}, ...series, ...edges],
      bands: spec.band ? [{ series: [high, low], fill: () => colour("--band") }] : [],
      cursor: {
        y: false,
        sync: { key: "step" },
        drag: { x: true, y: false, setScale: false },
        points: { size: 6 },
        bind: {
          dblclick: () => () => {
            curves.zoom(null);
            return null;
          },
        },
      },
      hooks: {
        setCursor: [() => this.#read()],
        setSelect: [(u) => this.#zoomToSelection(u)],
      },
    };
  }

  /** @param {uPlot} u */
  #zoomToSelection(u) {
    const { left, width } = u.select;
    if (width < 6) return;
    const from = Math.round(u.posToVal(left, "x"));
    const to = Math.round(u.posToVal(left + width, "x"));
    u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    if (to > from) this.curves.zoom([from, to]);
  }

  /**
   * Show the values under the cursor, else the latest ones. Of the evaluations, show the last one
   * at or before the cursor.
   */
  #read() {
    const data = this.uplot?.data;
    const index = this.uplot?.cursor.idx ?? null;
    const isAt = data !== undefined && index !== null;
    this.step.textContent = isAt ? `step ${count(data[0][index])}` : "";
    this.values.forEach(({ item, value }, position) => {
      const text = this.format(
        isAt
          ? valueAt(/** @type {Values} */ (data[position + 1]), index, item)
          : this.curves.history?.latest(item.name),
      );
      if (value.textContent !== text) value.textContent = text;
    });
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    if (!this.uplot) return;
    const last = this.uplot.data[0].length - 1;
    const now = this.uplot.cursor.idx ?? last + 1;
    /** @type {Record<string, number>} */
    const targets = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: last };
    const to = targets[event.key];
    if (event.key === "Escape") this.#point(null);
    if (to === undefined) return;
    event.preventDefault();
    this.#point(Math.min(last, Math.max(0, to)));
    const read = this.values.filter(({ entry }) => !entry.hidden);
    $("announcer").textContent =
      `${this.spec.title}, ${this.step.textContent}: ` +
      read.map(({ item, value }) => `${item.label} ${value.textContent}`).join(", ");
  }

  /**
   * Put the cursor on a point; null removes it.
   * @param {number | null} index
   */
  #point(index) {
    if (!this.uplot) return;
    const left = index === null ? -10 : this.uplot.valToPos(this.uplot.data[0][index], "x");
    this.uplot.setCursor({ left, top: index === null ? -10 : 10 });
  }
}

const STEP_INCREMENTS = [1, 2, 5]
  .flatMap((n) => [0, 1, 2, 3, 4, 5, 6].map((e) => n * 10 ** e))
  .sort((a, b) => a - b);

/**
 * Whether a line has a single value, which only a point can show.
 * @param {uPlot} u
 * @param {number} index
 */
const alone = (u, index) => [...u.data[index]].filter((value) => value !== null).length === 1;

/**
 * @param {Values} values
 * @param {number} index
 * @param {Line} item
 */
const valueAt = (values, index, { dots }) =>
  dots ? values.slice(0, index + 1).findLast((value) => value !== null) : values[index];

// The ranges of the axes, from the lowest and the highest value; both are null without a value.

/**
 * @param {Curves} curves
 * @param {number | null} min
 * @param {number | null} max
 * @returns {[number, number]}
 */
function stepRange(curves, min, max) {
  if (curves.range) return curves.range;
  return min === null || max === null ? [0, 1] : [min, Math.max(max, min + 1)];
}

/**
 * @param {number | null} min
 * @param {number | null} max
 * @returns {uPlot.Range.MinMax}
 */
function logRange(min, max) {
  return min === null || max === null ? [1e-4, 1] : uPlot.rangeLog(min, max, 10, true);
}

/**
 * @param {Spec} spec
 * @param {number | null} min
 * @param {number | null} max
 * @returns {uPlot.Range.MinMax}
 */
function linearRange(spec, min, max) {
  if (spec.percent || min === null || max === null) return [0, 1];
  if (spec.zero && min >= 0) return [0, max > 0 ? max * 1.1 : 1];
  if (min === max) return [min - Math.abs(min || 1) * 0.5, max + Math.abs(max || 1) * 0.5];
  return uPlot.rangeNum(min, max, 0.08, false);
}

export class Curves {
  /**
   * @param {HTMLElement} element
   * @param {(range: Range | null) => void} onZoom
   */
  constructor(element, onZoom) {
    this.element = element;
    this.onZoom = onZoom;
    /** @type {History | null} */
    this.history = null;
    /** @type {Range | null} */
    this.range = null; // null shows all steps
    /** @type {number | null} */
    this.frame = null; // the requested animation frame
    this.charts = CHARTS.map((spec) => new Chart(spec, this));
    element.replaceChildren(...this.charts.map((chart) => chart.element));
    this.numDraws = 0; // for tests: it grows when curves are drawn
    /** @type {Map<Element, Chart>} */
    const byElement = new Map(this.charts.map((chart) => [chart.element, chart]));
    this.view = new IntersectionObserver(
      (entries) => {
        for (const entry of entries) {
          const chart = byElement.get(entry.target);
          if (!chart) continue;
          chart.isInView = entry.isIntersecting;
          if (chart.isDue) this.#wake();
        }
      },
      { rootMargin: "200px" },
    );
    const sizes = new ResizeObserver(() => this.draw());
    for (const chart of this.charts) {
      this.view.observe(chart.element);
      sizes.observe(chart.plot);
    }
  }

  /** @param {History} history */
  show(history) {
    this.history = history;
    this.zoom(null);
  }

  /** @param {Range | null} range */
  zoom(range) {
    this.range = range;
    this.onZoom(range);
    this.draw();
  }

  /** Draw every chart in the next animation frame; further calls until then cost nothing. */
  draw() {
    for (const chart of this.charts) {
      chart.isDue = true;
      // A hidden chart never comes into view by itself, so show it as soon as it has values.
      if (chart.spec.when && this.history)
        chart.element.hidden = !this.history.has(chart.spec.when);
    }
    this.#wake();
  }

  recolour() {
    for (const chart of this.charts) chart.recolour();
  }

  #wake() {
    if (this.frame || !this.history || this.history.isEmpty) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = null;
      const { history } = this;
      if (!history) return;
      const due = this.charts.filter((chart) => chart.isDue && chart.isInView);
      for (const chart of due) chart.draw(history);
      if (due.length) this.numDraws++;
      this.element.dataset.draws = String(this.numDraws);
    });
  }
}
