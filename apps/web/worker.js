// The worker that holds the model: files, runtime, one call at a time. The page talks to it through edgewright.js.
import * as ort from "./vendor/ort.wasm.bundle.min.mjs";
import { Tokenizer } from "./vendor/tokenizers.min.mjs";
import { Runtime, oneLine } from "./runtime.js";
import { loadFiles } from "./storage.js";

const cancelled = new Set();
let runtime;

const turn = new MessageChannel();
const waiting = [];
turn.port1.onmessage = () => waiting.shift()?.();
/** Lets messages in, such as the one that cancels. */
const breathe = () =>
  new Promise((resolve) => {
    waiting.push(resolve);
    turn.port2.postMessage(null);
  });

const calls = {
  async open({ base, threads }, tell) {
    const response = await fetch(new URL("app.json", base)).catch(() => null);
    if (!response?.ok) throw new Error(`app.json cannot be fetched from ${base}`);
    const app = await response.json();
    ort.env.wasm.wasmPaths = { wasm: new URL("./vendor/ort-wasm-simd-threaded.wasm", import.meta.url).href };
    ort.env.wasm.numThreads = self.crossOriginIsolated ? threads || Math.min(4, navigator.hardwareConcurrency || 1) : 1;
    const files = await loadFiles(app, base, { onProgress: (progress) => tell({ progress }) });
    runtime = await Runtime.open(app, files, ort, Tokenizer, { onStep: (step) => tell({ step }) });
    return { app, threads: ort.env.wasm.numThreads };
  },

  generate({ prompt, options }, tell, id) {
    const own = { onText: (text) => tell({ text }), pause: breathe, cancelled: () => cancelled.has(id) };
    return runtime.generate(prompt, { ...options, ...own });
  },

  embed: ({ text, options }) => runtime.embed(text, options),
  readContext: ({ context }) => runtime.readContext(typeof context === "string" ? runtime.encode(context) : context),
  checkTraces: ({ traces }) => runtime.checkTraces(traces),
  bench: ({ options }, tell) => runtime.bench({ ...options, onRow: (row) => tell({ row }) }),
};

self.onmessage = async ({ data: { id, call, given } }) => {
  if (call === "cancel") {
    cancelled.add(given.id);
    return;
  }
  try {
    const result = await calls[call](given, (event) => self.postMessage({ id, event }), id);
    self.postMessage({ id, result });
  } catch (error) {
    self.postMessage({ id, error: oneLine(error) });
  }
  cancelled.delete(id);
};
