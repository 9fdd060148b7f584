// The numbers of a run by step, in columns, thinned out to what a chart can show.

/** @import { EvalRecord, RunEvent, StateRecord, StepRecord } from "./wire.js" */

/** The fields of a step record that the charts show. */
const STEP_COLUMNS = /** @type {const} */ ([
  "reward_mean",
  "sampler_kl",
  "reference_kl",
  "logprob_gap",
  "logprob_gap_p99",
  "logprob_gap_max",
  "staleness_mean",
  "staleness_max",
  "tokens_per_s",
  "trainer_idle_fraction",
  "rollout_idle_fraction",
  "loss",
  "grad_norm",
  "entropy",
  "completion_tokens_mean",
  "truncated_fraction",
  "token_ess",
  "sequence_ess",
  "step_s",
  "wait_s",
  "update_s",
  "sync_s",
  "value_loss",
  "explained_variance",
  "preference_accuracy",
  "preference_margin",
]);
const COLUMNS = /** @type {const} */ ([
  ...STEP_COLUMNS,
  "reward_low",
  "reward_high",
  "constant_fraction",
  "stale_kl",
  "eval_sampled",
  "eval_greedy",
]);

/**
 * @typedef {(typeof COLUMNS)[number]} ColumnName
 * @typedef {(number | null)[]} Column one value per step, null where there is none
 * @typedef {[first: number, last: number]} Range steps, both included
 */

/**
 * KL(sampler ‖ policy) over the tokens of older versions, nats; null when there are none.
 * @param {Pick<StepRecord, "kl_by_lag">} step
 */
export function staleKl({ kl_by_lag: byLag = [] }) {
  const stale = byLag.filter(({ lag }) => lag > 0);
  const numTokens = stale.reduce((sum, { num_tokens: n }) => sum + n, 0);
  return numTokens
    ? stale.reduce((sum, { kl, num_tokens: n }) => sum + kl * n, 0) / numTokens
    : null;
}

export class History {
  constructor() {
    /** @type {number[]} */
    this.steps = [];
    this.columns = /** @type {Record<ColumnName, Column>} */ (
      Object.fromEntries(COLUMNS.map((name) => [name, /** @type {Column} */ ([])]))
    );
    /** @type {StepRecord | null} */
    this.lastStep = null;
    /** @type {EvalRecord | null} */
    this.lastEval = null;
    /** @type {StateRecord | null} */
    this.state = null;
    /** @type {number[]} */
    this.stepSeconds = [];
  }

  get isEmpty() {
    return this.steps.length === 0;
  }

  /** Median over the last 20 steps, an estimate for the next one; null before the first. */
  get typicalStepSeconds() {
    const sorted = this.stepSeconds.slice(-20).sort((a, b) => a - b);
    return sorted.length ? sorted[sorted.length >> 1] : null;
  }

  /** @param {RunEvent} event */
  add(event) {
    if (event.kind === "state") this.state = event;
    else if (event.kind === "eval") this.#addEval(event);
    else this.#addStep(event);
  }

  /** @param {StepRecord} event */
  #addStep(event) {
    this.lastStep = event;
    this.stepSeconds.push(event.step_s);
    const row = this.#row(event.step);
    for (const name of STEP_COLUMNS) {
      this.columns[name][row] = event[name] ?? null; // absent where it does not apply
    }
    this.columns.stale_kl[row] = staleKl(event);
    const { reward_mean: mean, reward_std: std, num_constant_groups: numConstant } = event;
    if (mean !== undefined && std !== undefined) {
      this.columns.reward_low[row] = mean - std;
      this.columns.reward_high[row] = mean + std;
    }
    if (numConstant !== undefined) {
      this.columns.constant_fraction[row] = event.num_groups
        ? numConstant / event.num_groups
        : null;
    }
  }

  /** @param {EvalRecord} event */
  #addEval(event) {
    this.lastEval = event;
    const row = this.#row(event.step);
    this.columns.eval_sampled[row] = event.sampled_reward;
    this.columns.eval_greedy[row] = event.greedy_reward;
  }

  /**
   * The row of `step`: nearly always the last one, or a new one after it.
   * @param {number} step
   */
  #row(step) {
    let row = this.steps.length;
    while (row > 0 && this.steps[row - 1] > step) row--;
    if (row > 0 && this.steps[row - 1] === step) return row - 1;
    this.steps.splice(row, 0, step);
    for (const column of Object.values(this.columns)) column.splice(row, 0, null);
    return row;
  }

  /**
   * The last value of a column, or null.
   * @param {ColumnName} name
   */
  latest(name) {
    return this.columns[name].findLast((value) => value !== null) ?? null;
  }

  /**
   * Whether a column has a value other than 0.
   * @param {ColumnName} name
   */
  has(name) {
    return this.columns[name].some((value) => value);
  }

  /**
   * The steps and columns within `range` (null: all), thinned out to about `maxPoints` points. Of
   * the steps that share a point, the lowest and the highest value stay, in their order, so that a
   * spike remains visible however long the run is.
   * @param {ColumnName[]} names
   * @param {Range | null} range
   * @param {number} maxPoints
   * @returns {[steps: number[], ...columns: Column[]]}
   */
  points(names, range, maxPoints) {
    const first = range ? lowerBound(this.steps, range[0]) : 0;
    const end = range ? lowerBound(this.steps, range[1] + 1) : this.steps.length;
    const columns = names.map((name) => this.columns[name]);
    const stride = Math.ceil((2 * (end - first)) / maxPoints);
    if (stride <= 2)
      return [this.steps.slice(first, end), ...columns.map((c) => c.slice(first, end))];
    /** @type {number[]} */
    const steps = [];
    /** @type {Column[]} */
    const thinned = columns.map(() => []);
    for (let start = first; start < end; start += stride) {
      const stop = Math.min(start + stride, end);
      steps.push(this.steps[start]);
      if (stop - start > 1) steps.push(this.steps[stop - 1]);
      columns.forEach((column, index) => {
        const [a, b] = extremes(column, start, stop);
        thinned[index].push(a);
        if (stop - start > 1) thinned[index].push(b);
      });
    }
    return [steps, ...thinned];
  }
}

/**
 * The lowest and the highest value of some rows, in their order; null for what is missing.
 * @param {Column} column
 * @param {number} start
 * @param {number} stop
 */
function extremes(column, start, stop) {
  let low = -1;
  let high = -1;
  let lowest = Infinity;
  let highest = -Infinity;
  for (let i = start; i < stop; i++) {
    const value = column[i];
    if (value === null) continue;
    if (low < 0 || value < lowest) [low, lowest] = [i, value];
    if (high < 0 || value > highest) [high, highest] = [i, value];
  }
  if (low < 0) return [null, null];
  if (low === high) return [column[low], null];
  return low < high ? [column[low], column[high]] : [column[high], column[low]];
}

/**
 * The first index whose value is not below `value`.
 * @param {number[]} sorted
 * @param {number} value
 */
function lowerBound(sorted, value) {
  let low = 0;
  let high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low;
}
