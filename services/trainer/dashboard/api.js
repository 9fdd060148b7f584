// The trainer's routes, called with the key: JSON in and out, and events as a stream.

/**
 * @import {
 *   CompletionsResponse, ReplicasResponse, RunEvent, RunStatus, TrainerStatus
 * } from "./wire.js"
 *
 * @typedef {object} Options
 * @property {string} [method]
 * @property {string} [body]
 * @property {Record<string, string>} [headers]
 * @property {AbortSignal} [signal]
 * @property {number} [timeoutMs]
 *
 * @typedef {{id: number, data: RunEvent}} NumberedEvent
 */

const STORED = "tandem.key";
const SILENCE_MS = 45_000; // the trainer sends a comment every 15 s

/** The trainer answered with an error; `message` is its explanation, one sentence. */
export class Problem extends Error {
  /**
   * @param {number} status
   * @param {string} detail
   */
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

/** Nothing answered, or something other than a trainer did. */
export class Away extends Error {}

export const key = {
  get: () => sessionStorage.getItem(STORED) ?? localStorage.getItem(STORED),
  /**
   * @param {string} value
   * @param {boolean} remember whether to keep it after this tab is closed
   */
  set(value, remember) {
    key.forget();
    (remember ? localStorage : sessionStorage).setItem(STORED, value);
  },
  forget() {
    sessionStorage.removeItem(STORED);
    localStorage.removeItem(STORED);
  },
};

/**
 * Throws Problem for an error of the trainer, Away when the trainer is not there to answer.
 * @param {string} path
 * @param {Options} [options]
 */
async function request(
  path,
  { method = "GET", body, headers = {}, signal, timeoutMs = 10_000 } = {},
) {
  const own = new AbortController();
  const timer = setTimeout(() => own.abort(), timeoutMs);
  const stop = () => own.abort();
  signal?.addEventListener("abort", stop, { once: true });
  try {
    const given = key.get();
    const response = await fetch(path, {
      method,
      body,
      cache: "no-store",
      signal: own.signal,
      headers: { ...headers, ...(given && { Authorization: `Bearer ${given}` }) },
    });
    if (response.ok) return response;
    const problem = await response.json().catch(() => null);
    if (problem?.detail) throw new Problem(response.status, problem.detail);
    throw new Away(`${method} ${path} got HTTP ${response.status}, but not from the trainer`);
  } catch (error) {
    if (error instanceof Problem || error instanceof Away || signal?.aborted) throw error;
    throw new Away("the trainer does not answer");
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener("abort", stop);
  }
}

/**
 * @param {string} path
 * @param {Options} [options]
 * @returns {Promise<any>}
 */
async function json(path, options) {
  const response = await request(path, options);
  try {
    return await response.json();
  } catch {
    throw new Away(`the answer to ${path} is incomplete or not JSON`);
  }
}

/** @type {() => Promise<TrainerStatus>} */
export const getStatus = () => json("/status");

/** @type {() => Promise<ReplicasResponse>} */
export const getReplicas = () => json("/replicas");

/** @type {(numGroups: number) => Promise<CompletionsResponse>} */
export const getCompletions = (numGroups) =>
  json(`/runs/current/completions?num_groups=${numGroups}`);

export const getConfig = async () => (await request("/runs/current/config")).text();

/** @type {(config: string) => Promise<RunStatus>} */
export const startRun = (config) =>
  json("/runs", {
    method: "POST",
    body: config,
    headers: { "Content-Type": "application/yaml" },
    timeoutMs: 600_000, // the trainer loads the dataset before it answers
  });

/** @type {() => Promise<RunStatus>} */
export const stopRun = () => json("/runs/current/stop", { method: "POST", timeoutMs: 60_000 });

/**
 * The events of the current run after `lastId`, in batches as they arrive, until the run ends. The
 * first batch is empty and means that the trainer has answered. Throws Away when the stream breaks
 * or goes silent.
 * @param {number} lastId
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<NumberedEvent[], void>}
 */
export async function* events(lastId, signal) {
  const response = await request("/runs/current/events", {
    signal,
    headers: { "Last-Event-ID": String(lastId), Accept: "text/event-stream" },
  });
  if (!response.body) throw new Away("the event stream has no body");
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const stop = () => reader.cancel().catch(() => {});
  signal.addEventListener("abort", stop, { once: true });
  let rest = "";
  try {
    yield [];
    while (true) {
      const { done, value } = await inTime(reader.read());
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop() ?? "";
      const found = blocks.flatMap(parse);
      if (found.length) yield found;
    }
  } catch (error) {
    throw signal.aborted ? error : new Away("the event stream was cut off");
  } finally {
    signal.removeEventListener("abort", stop);
    stop();
  }
}

/**
 * `read`, or Away after SILENCE_MS.
 * @template T
 * @param {Promise<T>} read
 */
function inTime(read) {
  /** @type {ReturnType<typeof setTimeout>} */
  let timer;
  /** @type {Promise<never>} */
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Away("the event stream went silent")), SILENCE_MS);
  });
  return Promise.race([read, late]).finally(() => clearTimeout(timer));
}

/**
 * The event of a block, in a list; an empty list for a comment.
 * @param {string} block
 * @returns {NumberedEvent[]}
 */
function parse(block) {
  /** @type {Record<string, string>} */
  const fields = {};
  for (const line of block.split("\n")) {
    const end = line.indexOf(":");
    if (end > 0) fields[line.slice(0, end)] = line.slice(end + 1).trimStart();
  }
  return fields.data ? [{ id: Number(fields.id), data: JSON.parse(fields.data) }] : [];
}
