// A model in a page: everything heavy runs in a worker.
//
//   import { open } from "./edgewright.js";
//   const model = await open({ onProgress: ({ loaded, total }) => … });
//   const text = await model.generate("k n i g h t", { onText: (piece) => … });

/**
 * Opens the model. base: the folder of app.json. threads: 0 is up to four where the page is cross-origin isolated, else one.
 * onProgress: ({ name, loaded, total, cached }) in bytes. onStep: what is done after that. Rejects with a one-line Error.
 */
export async function open({ base = "./model/", threads = 0, onProgress, onStep } = {}) {
  const worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
  const model = new Model(worker);
  const given = { base: new URL(base, document.baseURI).href, threads };
  try {
    const opened = await model.call("open", given, ({ progress, step }) => (progress ? onProgress?.(progress) : onStep?.(step)));
    return Object.assign(model, { info: opened.app, threads: opened.threads });
  } catch (error) {
    worker.terminate();
    throw error;
  }
}

export class Model {
  constructor(worker) {
    Object.assign(this, { worker, info: null, threads: 1, busy: false, open: new Map(), next: 0 });
    worker.onmessage = ({ data: { id, event, result, error } }) => {
      const call = this.open.get(id);
      if (event) return call?.onEvent?.(event);
      this.open.delete(id);
      return error === undefined ? call?.resolve(result) : call?.reject(new Error(error));
    };
    worker.onerror = (event) => {
      event.preventDefault();
      this.failAll(event.message || "the worker does not start: serve the folder over http, and look whether all files are there");
    };
  }

  failAll(line) {
    for (const { reject } of this.open.values()) reject(new Error(line));
    this.open.clear();
  }

  async call(call, given, onEvent, signal) {
    if (this.busy) throw new Error("the model is answering already; wait for that answer, or cancel it");
    this.busy = true;
    const id = this.next++;
    const cancel = () => this.worker.postMessage({ call: "cancel", given: { id } });
    try {
      signal?.throwIfAborted();
      signal?.addEventListener("abort", cancel);
      return await new Promise((resolve, reject) => {
        this.open.set(id, { resolve, reject, onEvent });
        this.worker.postMessage({ id, call, given });
      });
    } finally {
      signal?.removeEventListener("abort", cancel);
      this.busy = false;
    }
  }

  /** The text that follows a prompt (a text, or token ids). options: see `answer`. */
  async generate(prompt, options = {}) {
    return (await this.answer(prompt, options)).text;
  }

  /**
   * { text, tokens, ending, promptTokens, firstMs, ms }. options: onText(piece), maxNewTokens, sampling ({ temperature, top_p, top_k,
   * min_p, repetition_penalty, no_repeat_ngram, seed }), stops, chat, memory, context (a text, read first), signal (an AbortSignal).
   */
  async answer(prompt, { onText, signal, context, ...options } = {}) {
    if (context !== undefined) options.memory = await this.readContext(context);
    return this.call("generate", { prompt, options }, ({ text }) => onText?.(text), signal);
  }

  /** The vector of a text (or token ids) of a model of embeddings: Float32Array. options: promptName, of the model's own prompts. */
  embed(text, options = {}) {
    return this.call("embed", { text, options });
  }

  /** What a decoder-decoder makes of a context; pass it as `memory` to any number of prompts. */
  readContext(context) {
    return this.call("readContext", { context });
  }

  /** Checks the golden traces: { cases, texts, wrong, largest }. */
  async checkTraces(url = "./model/traces.json") {
    const response = await fetch(new URL(url, document.baseURI));
    return this.call("checkTraces", { traces: await response.json() });
  }

  /** Rows { test, tokensPerSecond, std, repeats } of tokens read (pp) and generated (tg) a second. */
  bench({ onRow, ...options } = {}) {
    return this.call("bench", { options }, ({ row }) => onRow?.(row));
  }

  close() {
    this.worker.terminate();
    this.failAll("the model was closed");
  }
}
