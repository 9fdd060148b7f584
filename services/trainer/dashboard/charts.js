// @ts-check
// The curves: history in, one uPlot per chart out, drawn once per animation frame and only in view.

import plot from "./vendor/uPlot.esm.js";
import { $, NONE, count, h, number, percent, seconds, tick } from "./text.js";

/** @type {any} */
const uPlot = plot; // the vendored file has no types
const POINTS_PER_PIXEL = 2;

const line = (name, label, colour, more = {}) => ({ name, label, colour, ...more });
const dots = { dots: true };

/** In the order of the page. `when` is a column without which a chart tells nothing. */
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
    lines: [line("tokens_per_s", "of the whole step", "--s1")],
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

let probe;
/** The colour that a custom property stands for now: light-dark() is resolved by the browser. */
function colour(property) {
  probe ??= document.body.appendChild(h("i", { className: "hidden", ariaHidden: "true" }));
  probe.style.color = `var(${property})`;
  return getComputedStyle(probe).color;
}

class Chart {
  constructor(spec, curves) {
    this.spec = spec;
    this.curves = curves;
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
        onkeydown: (e) => this.#key(e),
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

  draw() {
    const { history, range } = this.curves;
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
    let data = history.points(this.names, range, POINTS_PER_PIXEL * width);
    const nothing = (column) => column.map(() => null);
    const [steps, ...columns] = data;
    data = [
      steps,
      ...columns.map((column, index) =>
        this.values[index]?.entry.hidden
          ? nothing(column)
          : spec.log
            ? column.map((value) => (value > 0 ? value : null))
            : column,
      ),
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

  #options(width, height) {
    const { spec, curves } = this;
    const axis = {
      stroke: () => colour("--soft"),
      font: `11px ${getComputedStyle(document.body).fontFamily}`,
      ticks: { show: false },
      gap: 6,
    };
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
    const edges = spec.band ? [{ stroke: "transparent" }, { stroke: "transparent" }] : [];
    for (const edge of edges) Object.assign(edge, { width: 0, points: { show: false } });
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
              v === null ? "" : spec.percent ? `${Math.round(100 * v)}\u202f%` : tick(v, spec.log),
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
        bind: { dblclick: () => () => curves.zoom(null) },
      },
      hooks: {
        setCursor: [() => this.#read()],
        setSelect: [(u) => this.#zoomToSelection(u)],
      },
    };
  }

  #zoomToSelection(u) {
    const { left, width } = u.select;
    if (width < 6) return;
    const from = Math.round(u.posToVal(left, "x"));
    const to = Math.round(u.posToVal(left + width, "x"));
    u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    if (to > from) this.curves.zoom([from, to]);
  }

  /** The values under the cursor, or else the latest ones; of an evaluation the last one before. */
  #read() {
    const index = this.uplot?.cursor.idx;
    const isAt = index !== null && index !== undefined;
    this.step.textContent = isAt ? `step ${count(this.uplot.data[0][index])}` : "";
    this.values.forEach(({ item, value }, position) => {
      const column = this.uplot?.data[position + 1];
      const shown = !isAt
        ? this.curves.history.latest(item.name)
        : item.dots
          ? column.slice(0, index + 1).findLast((reward) => reward !== null)
          : column[index];
      const text = this.format(shown);
      if (value.textContent !== text) value.textContent = text;
    });
  }

  #key(event) {
    if (!this.uplot) return;
    const last = this.uplot.data[0].length - 1;
    const now = this.uplot.cursor.idx ?? last + 1;
    const to = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: last }[event.key];
    if (event.key === "Escape") this.#point(null);
    if (to === undefined) return;
    event.preventDefault();
    this.#point(Math.min(last, Math.max(0, to)));
    const read = this.values.filter(({ entry }) => !entry.hidden);
    $("announcer").textContent =
      `${this.spec.title}, ${this.step.textContent}: ` +
      read.map(({ item, value }) => `${item.label} ${value.textContent}`).join(", ");
  }

  #point(index) {
    if (!this.uplot) return;
    const left = index === null ? -10 : this.uplot.valToPos(this.uplot.data[0][index], "x");
    this.uplot.setCursor({ left, top: index === null ? -10 : 10 });
  }
}

const STEP_INCREMENTS = [1, 2, 5]
  .flatMap((n) => [0, 1, 2, 3, 4, 5, 6].map((e) => n * 10 ** e))
  .sort((a, b) => a - b);
const alone = (u, index) => u.data[index].filter((value) => value !== null).length === 1;

function stepRange(curves, min, max) {
  if (curves.range) return curves.range;
  return min === null ? [0, 1] : [min, Math.max(max, min + 1)];
}

function logRange(min, max) {
  return min === null ? [1e-4, 1] : uPlot.rangeLog(min, max, 10, true);
}

function linearRange(spec, min, max) {
  if (spec.percent) return [0, 1];
  if (min === null) return [0, 1];
  if (spec.zero && min >= 0) return [0, max > 0 ? max * 1.1 : 1];
  if (min === max) return [min - Math.abs(min || 1) * 0.5, max + Math.abs(max || 1) * 0.5];
  return uPlot.rangeNum(min, max, 0.08, false);
}

export class Curves {
  constructor(element, onZoom) {
    this.element = element;
    this.onZoom = onZoom;
    this.history = null;
    this.range = null; // steps that are shown; null: all
    this.charts = CHARTS.map((spec) => new Chart(spec, this));
    element.replaceChildren(...this.charts.map((chart) => chart.element));
    this.numDraws = 0; // what the tests watch: curves move
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

  show(history) {
    this.history = history;
    this.zoom(null);
  }

  zoom(range) {
    this.range = range;
    this.onZoom(range);
    this.draw();
  }

  /** Have every chart drawn at the next frame; calls until then cost nothing. */
  draw() {
    for (const chart of this.charts) {
      chart.isDue = true;
      // One that is hidden is never in view: the history says whether it is due.
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
      const due = this.charts.filter((chart) => chart.isDue && chart.isInView);
      for (const chart of due) chart.draw();
      this.numDraws += Number(due.length > 0);
      this.element.dataset.draws = this.numDraws;
    });
  }
}
