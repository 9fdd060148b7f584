// @ts-check
// The trainer's routes, with the key: JSON in and out, problems as sentences, events as a stream.

const STORED = "tandem.key";
const SILENCE_MS = 45_000; // the trainer sends a comment every 15 s

/** The trainer answered with an error; `message` is its sentence. */
export class Problem extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

/** Nothing answered, or what did is no trainer. */
export class Away extends Error {}

export const key = {
  get: () => sessionStorage.getItem(STORED) ?? localStorage.getItem(STORED),
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
 * @param {string} path
 * @param {{method?: string, body?: string, headers?: Record<string, string>, signal?: AbortSignal,
 *   timeoutMs?: number}} [options]
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
    throw new Away(`the answer to ${method} ${path} is HTTP ${response.status}, not the trainer’s`);
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
 * @param {Parameters<typeof request>[1]} [options]
 * @returns {Promise<any>}
 */
async function json(path, options) {
  const response = await request(path, options);
  try {
    return await response.json();
  } catch {
    throw new Away(`the answer to ${path} was cut`);
  }
}

export const getStatus = () => json("/status");
export const getReplicas = async () => (await json("/replicas")).replicas;
export const getCompletions = (numGroups) =>
  json(`/runs/current/completions?num_groups=${numGroups}`);
export const getConfig = async () => (await request("/runs/current/config")).text();
export const startRun = (config) =>
  json("/runs", {
    method: "POST",
    body: config,
    headers: { "Content-Type": "application/yaml" },
    timeoutMs: 600_000, // it loads the dataset
  });
export const stopRun = () => json("/runs/current/stop", { method: "POST", timeoutMs: 60_000 });

/**
 * The events of the current run after `lastId`, as `[{id, data}, …]` per read, until the run ends;
 * the first one is empty and says that the trainer has answered. Throws Away when the stream is cut
 * or falls silent.
 */
export async function* events(lastId, signal) {
  const response = await request("/runs/current/events", {
    signal,
    headers: { "Last-Event-ID": String(lastId), Accept: "text/event-stream" },
  });
  if (!response.body) throw new Away("the stream of events has no body");
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
    throw signal.aborted ? error : new Away("the stream of events was cut");
  } finally {
    signal.removeEventListener("abort", stop);
    stop();
  }
}

function inTime(read) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Away("the stream of events fell silent")), SILENCE_MS);
  });
  return Promise.race([read, late]).finally(() => clearTimeout(timer));
}

/**
 * @param {string} block
 * @returns {{id: number, data: any}[]} its event, if it is one
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
