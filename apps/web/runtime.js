// The generate loop over onnxruntime-web: app.json opened, tokens in and out. No page, no worker, no network in here.
//
//   const runtime = await Runtime.open(app, files, ort, Tokenizer, { threads: 4 });
//   const answer = await runtime.generate("k n i g h t", { onText: (piece) => … });

const KINDS = { float32: Float32Array, int8: Int8Array, int32: Int32Array };

const sizeOf = (dims) => dims.reduce((a, b) => a * b, 1);
const fail = (line) => {
  throw new Error(line);
};

/** The float32 matrices that a graph reads, made of the codes and scales in the weights' file. */
export function expand(expanded, weights) {
  const out = new ArrayBuffer(expanded.bytes);
  for (const m of expanded.matrices) {
    const codes = weights.subarray(m.codes[0], m.codes[0] + m.codes[1]);
    const scales = new Float32Array(weights.slice(m.scales[0], m.scales[0] + m.scales[1]).buffer);
    expandMatrix(new Float32Array(out, m.offset, m.rows * m.columns), codes, scales, m);
  }
  return new Uint8Array(out);
}

function expandMatrix(out, codes, scales, { rows, columns, bits, block }) {
  const perByte = 8 / bits, mask = (1 << bits) - 1, zero = 1 << (bits - 1);
  const rowBytes = columns / perByte, rowScales = columns / block, tile = 16;
  for (let first = 0; first < rows; first += tile) { // rows side by side, so that writes lie together
    const last = Math.min(rows, first + tile);
    for (let c = 0; c < columns; c++) {
      const byte = Math.floor(c / perByte), shift = (c % perByte) * bits, group = Math.floor(c / block);
      for (let r = first; r < last; r++) {
        const code = (codes[r * rowBytes + byte] >> shift) & mask;
        out[c * rows + r] = (code - zero) * scales[r * rowScales + group];
      }
    }
  }
}

export class Runtime {
  /** files: name -> Uint8Array of each file in app.files. onStep: is told what is being done. Throws a one-line Error. */
  static async open(app, files, ort, Tokenizer, { onStep = () => {} } = {}) {
    if (app.schema_version !== 1) fail("app.json is of another version: embed the bundle again");
    const runtime = new Runtime(app, ort);
    const externalData = [{ path: "weights.bin", data: files["weights.bin"] }];
    if (app.expanded) {
      onStep("expanding the weights");
      externalData.push({ path: app.expanded.file, data: expand(app.expanded, files[app.expanded.of]) });
    }
    for (const graph of app.graphs) {
      onStep(`opening ${graph.name}`);
      try {
        const options = { executionProviders: ["wasm"], externalData, logSeverityLevel: 3 };
        runtime.graphs[graph.name] = { spec: graph, session: await ort.InferenceSession.create(files[graph.file], options) };
      } catch (error) {
        fail(`${graph.file} does not open in onnxruntime-web ${ort.env.versions?.web ?? ""} (it needs ${graph.onnxruntime}): ${oneLine(error)}`);
      }
    }
    if (app.tokenizer) {
      const text = new TextDecoder().decode(files[app.tokenizer.file]);
      runtime.tokenizer = new Tokenizer(JSON.parse(text), {});
    }
    return runtime;
  }

  constructor(app, ort) {
    this.app = app;
    this.ort = ort;
    this.graphs = {};
    this.tokenizer = null;
  }

  ints(values, dims = [values.length]) {
    return new this.ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);
  }

  /** The tokens of a text, without what stands around a prompt. */
  encode(text) {
    if (!this.tokenizer) fail(`${this.app.name} has no tokenizer: give it token ids`);
    if (text === "") return [];
    const unknown = this.app.tokenizer.unknown;
    const ids = this.tokenizer.encode(text, { add_special_tokens: false }).ids.map((id) => id ?? unknown);
    return ids.filter((id) => id !== null);
  }

  decode(ids) {
    return ids.length ? this.tokenizer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false }) : "";
  }

  /** The tokens of a prompt, through the chat template where the model has one. */
  readPrompt(prompt, chat = true) {
    const { app } = this;
    if (!prompt.trim()) fail("the prompt is empty; give some text");
    let ids;
    if (chat && app.chat) {
      if (app.chat.before === null) fail("the chat template takes no lone question; pass chat: false, or token ids");
      ids = this.encode(app.chat.before + (app.chat.trims ? prompt.trim() : prompt) + app.chat.after);
    } else {
      ids = [...app.tokenizer.before, ...this.encode(prompt), ...app.tokenizer.after];
    }
    const { bos } = app.tokenizer;
    return bos !== null && ids[0] === bos && ids[1] === bos ? ids.slice(1) : ids;
  }

  /** The tokens of a text for a model of embeddings, behind one of its prompts; what is too long is cut. */
  readText(text, promptName) {
    const { embedding, tokenizer, max_context: most } = this.app;
    const name = promptName ?? embedding.default_prompt;
    if (!text.trim()) fail("the text is empty; give some text");
    if (name !== null && !Object.hasOwn(embedding.prompts, name)) {
      fail(`${name} is no prompt of this model; it has: ${Object.keys(embedding.prompts).join(", ") || "none"}`);
    }
    const whole = (name === null ? "" : embedding.prompts[name]) + text;
    const inner = this.encode(embedding.lower_case ? whole.toLowerCase() : whole);
    const room = Math.max(0, most - tokenizer.before.length - tokenizer.after.length);
    return [...tokenizer.before, ...inner.slice(0, room), ...tokenizer.after].slice(0, most);
  }

  /** The vector of a text, or of token ids: Float32Array. */
  async embed(text, { promptName } = {}) {
    const { app } = this;
    if (!app.embedding) fail("this model makes no vectors; use generate");
    const ids = typeof text === "string" ? this.readText(text, promptName) : [...text];
    this.require(ids, app.vocab, "the text");
    if (ids.length > app.max_context) fail(`the text has ${ids.length} tokens, the model reads at most ${app.max_context}; shorten it`);
    const dims = [1, ids.length], state = {};
    const encoder_mask = new this.ort.Tensor("bool", new Uint8Array(ids.length).fill(1), dims);
    await this.run("encoder", state, { input_ids: this.ints(ids, dims), encoder_mask });
    return Float32Array.from(state.sentence_embedding.data);
  }

  newStates(graph, capacity) {
    const made = {};
    for (const state of this.graphs[graph].spec.states.filter((s) => s.updated)) {
      const dims = state.shape.map((d) => ({ batch: 1, capacity })[d] ?? d);
      made[state.name] = new this.ort.Tensor(state.dtype, new KINDS[state.dtype](sizeOf(dims)), dims);
    }
    return made;
  }

  /** Runs a graph. What it puts out under the name of a state, with or without "_out", is the state's new value. */
  async run(graph, state, inputs) {
    const { session } = this.graphs[graph];
    const given = { ...state, ...inputs };
    const out = await session.run(Object.fromEntries(session.inputNames.map((name) => [name, given[name]])));
    for (const name of session.outputNames) state[name.replace(/_out$/, "")] = out[name];
  }

  require(ids, vocab, whose) {
    if (!ids.length) fail(`${whose} has no tokens; give some text`);
    const wrong = ids.find((id) => !Number.isInteger(id) || id < 0 || id >= vocab);
    if (wrong !== undefined) fail(`${whose} has the token ${wrong}, the model has ${vocab}`);
  }

  /** An answer under way. memory: of a decoder-decoder, what readContext gave. */
  async start(prompt, newTokens, memory = null) {
    const { app } = this;
    if (app.embedding) fail("this model makes vectors, and generates nothing; use embed");
    this.require(prompt, app.vocab, "the prompt");
    if (memory && !app.context) fail("this model keeps no memory of a context; give all of it as the prompt");
    if (memory && memory.fingerprint !== app.fingerprint) fail("the memory was made by other weights; read the context again");
    const stream = new Stream(this);
    if (app.task === "seq2seq") await stream.encode(prompt, newTokens);
    else stream.take(prompt, newTokens, memory);
    return stream;
  }

  /** The memory of a context of token ids; it serves any number of prompts. */
  async readContext(ids) {
    const { context, prefill_chunk: chunk, fingerprint } = this.app;
    if (!context) fail("this model reads no context; give all of it as the prompt");
    this.require(ids, context.vocab, "the context");
    const values = [];
    for (let from = 0; from < ids.length; from += context.window) {
      const part = ids.slice(from, from + context.window), all = [...part, ...context.tokens];
      const state = context.tokens.length ? this.newStates("context", all.length) : {};
      if (!context.tokens.length) {
        await this.run("context", state, { input_ids: this.ints(part, [1, part.length]) });
        values.push(...state.memory.data);
        continue;
      }
      for (let at = 0; at < all.length; at += chunk) {
        const tokens = all.slice(at, at + chunk);
        const wanted = tokens.map((_, i) => i).filter((i) => at + i >= part.length);
        const inputs = { input_ids: this.ints(tokens, [1, tokens.length]), past_length: this.ints([at]) };
        await this.run("context", state, { ...inputs, logit_positions: this.ints(wanted.length ? wanted : [tokens.length - 1]) });
        if (wanted.length) values.push(...state.memory.data);
      }
    }
    return { fingerprint, rows: values.length / context.hidden, values: Float32Array.from(values) };
  }

  /**
   * The answer to a prompt, a text or token ids: { text, tokens, ending, promptTokens, firstMs, ms }.
   * options: maxNewTokens, sampling, stops, chat, memory, onText(piece), pause() (awaited before each step), cancelled() -> boolean.
   */
  async generate(prompt, options = {}) {
    const { app } = this;
    const began = performance.now();
    const ids = typeof prompt === "string" ? this.readPrompt(prompt, options.chat) : [...prompt];
    const most = Math.min(options.maxNewTokens ?? app.max_new_tokens, app.max_context - 1);
    const sampler = new Sampler({ ...app.sampling, ...options.sampling });
    const stops = [...app.stops.strings, ...(options.stops ?? [])];
    if (most < 1) fail("0 new tokens were asked for; ask for 1 or more");
    if (stops.includes("")) fail("an empty stop string would stop before the first letter; give some text");
    const writer = new Writer(this, stops);
    const stream = await this.start(ids, most, options.memory);
    const tokens = [];
    let text = "", ending, first;
    const tell = (piece) => {
      text += piece;
      if (piece) options.onText?.(piece);
    };
    for (let logits = await stream.prefill(); !ending; ) {
      const token = sampler.pick(logits, [...stream.read]);
      first ??= performance.now();
      if (app.stops.tokens.includes(token)) {
        ending = "end";
        break;
      }
      tokens.push(token);
      tell(writer.put(token));
      await options.pause?.();
      if (options.cancelled?.()) ending = "cancelled";
      else if (writer.stopped) ending = "stop";
      else if (tokens.length === most) ending = "limit";
      else if (stream.past >= stream.capacity) ending = "context";
      else logits = await stream.feed(token);
    }
    if (ending !== "cancelled") tell(writer.end());
    if (writer.stopped) ending = "stop";
    return { text, tokens, ending, promptTokens: ids.length, firstMs: first - began, ms: performance.now() - first };
  }

  /** Feeds the recorded tokens; the lines of what differs by a clear margin, and the largest difference of logits. */
  async checkTraces(traces) {
    const wrong = [];
    let largest = 0;
    for (const [number, trace] of traces.cases.entries()) {
      const memory = trace.context.length ? await this.readContext(trace.context) : null;
      const stream = await this.start(trace.ids, traces.new_tokens, memory);
      let logits = await stream.prefill();
      for (const [i, step] of trace.steps.entries()) {
        const best = argmax(logits), top = new Map(step.top);
        for (const [token, logit] of step.top) largest = Math.max(largest, Math.abs(logits[token] - logit));
        const margin = step.top[0][1] - (top.get(best) ?? step.top.at(-1)[1]);
        if (best !== step.token && margin > traces.tolerance) {
          wrong.push(`trace ${number}, step ${i}: token ${best}, recorded ${step.token}`);
          break;
        }
        if (i + 1 < trace.steps.length) logits = await stream.feed(step.token);
      }
      const said = trace.steps.map((s) => s.token).slice(0, trace.ending === "end" ? -1 : undefined);
      if (trace.text !== null && this.decode(said) !== trace.text) wrong.push(`trace ${number}: another text`);
    }
    for (const [number, { text, ids, vector }] of (traces.vectors ?? []).entries()) {
      const here = await this.embed(ids);
      const apart = here.reduce((most, value, i) => Math.max(most, Math.abs(value - vector[i])), here.length === vector.length ? 0 : Infinity);
      largest = Math.max(largest, apart);
      if (!(apart <= traces.tolerance)) wrong.push(`vector ${number}: ${apart} apart`);
      if (text !== null && this.readText(text).join() !== ids.join()) wrong.push(`vector ${number}: other tokens`);
    }
    for (const { text, ids, decoded } of traces.texts) {
      const here = this.encode(text);
      if (here.join() !== ids.join()) wrong.push(`text ${JSON.stringify(text)}: tokens ${here.join()}, recorded ${ids.join()}`);
      else if (this.decode(ids) !== decoded) wrong.push(`text ${JSON.stringify(text)}: read back as ${JSON.stringify(this.decode(ids))}`);
    }
    return { cases: traces.cases.length + (traces.vectors ?? []).length, texts: traces.texts.length, wrong, largest };
  }

  /** Rows of tokens a second: reading (pp), and generating behind one token (tg), warm. onRow is told of each. */
  async bench({ pp = 64, tg = 32, repeats = 3, onRow = () => {} } = {}) {
    const most = this.app.max_context - 1, token = Math.floor(this.app.vocab / 2);
    const reading = Math.min(pp, most), writing = Math.min(tg, most - 1);
    const timed = {
      [`pp${reading}`]: async () => {
        const began = performance.now();
        const ids = Array(reading).fill(token);
        await (this.app.embedding ? this.embed(ids) : (await this.start(ids, 1)).prefill());
        return (1000 * reading) / (performance.now() - began);
      },
      [`tg${writing}`]: async () => {
        const stream = await this.start([token], writing + 1);
        await stream.prefill();
        const began = performance.now();
        for (let i = 0; i < writing; i++) await stream.feed(token);
        return (1000 * writing) / (performance.now() - began);
      },
    };
    const rows = [];
    for (const [test, once] of Object.entries(timed).slice(0, this.app.embedding ? 1 : 2)) {
      for (let i = 0; i < 2; i++) await once(); // the compiler's first tiers are slow
      const rates = [];
      for (let i = 0; i < repeats; i++) rates.push(await once());
      const mean = rates.reduce((a, b) => a + b, 0) / repeats;
      const std = Math.sqrt(rates.reduce((a, b) => a + (b - mean) ** 2, 0) / repeats);
      rows.push({ test, tokensPerSecond: mean, std, repeats });
      onRow(rows.at(-1));
    }
    return rows;
  }
}

class Stream {
  constructor(runtime) {
    Object.assign(this, { runtime, past: 0, capacity: 0, pending: [], read: [], state: {}, extra: {}, slots: null });
  }

  async encode(prompt, newTokens) {
    const { runtime, runtime: { app } } = this;
    if (prompt.length > app.max_context) {
      fail(`the prompt has ${prompt.length} tokens, the model reads at most ${app.max_context}; shorten it`);
    }
    this.capacity = Math.min(app.max_context, newTokens + 1 + app.forced.length);
    this.state = runtime.newStates("decoder", this.capacity);
    const dims = [1, prompt.length];
    this.extra.encoder_mask = new runtime.ort.Tensor("bool", new Uint8Array(prompt.length).fill(1), dims);
    await runtime.run("encoder", this.state, { input_ids: runtime.ints(prompt, dims), ...this.extra });
    await runtime.run("cross_kv", this.state, {});
    this.pending = [app.decoder_start, ...app.forced];
  }

  take(prompt, newTokens, memory) {
    const { runtime, runtime: { app, app: { context } } } = this;
    this.pending = [...prompt];
    if (context) {
      const rows = memory?.rows ?? 0;
      if (rows > context.rows) fail(`the context gives ${rows} rows of memory, the model takes ${context.rows}; give a shorter one`);
      const early = context.splice === "released" && rows ? 1 : 0;
      const lead = context.prefix.slice(0, context.prefix.length - early);
      this.slots = [...lead.map(() => -1), ...Array(rows).keys()];
      this.pending = [...lead, ...Array(rows + early).fill(0), ...prompt];
      const values = memory?.values ?? new Float32Array(context.hidden);
      this.extra.memory = new runtime.ort.Tensor("float32", values, [1, Math.max(1, rows), context.hidden]);
    }
    if (this.pending.length >= app.max_context) {
      fail(`the prompt has ${this.pending.length} tokens, the model's context is ${app.max_context}; shorten it`);
    }
    this.capacity = Math.min(app.max_context, this.pending.length + newTokens);
    this.state = runtime.newStates("decoder", this.capacity);
  }

  /** Reads the prompt; the logits of what comes next. */
  prefill() {
    return this.append(this.pending);
  }

  feed(token) {
    return this.append([token]);
  }

  async append(tokens) {
    const { runtime, runtime: { app } } = this;
    if (this.past + tokens.length > this.capacity) {
      fail(`${this.past + tokens.length} tokens do not fit the context of ${this.capacity}; ask for fewer new tokens, or shorten the prompt`);
    }
    for (let at = 0; at < tokens.length; at += app.prefill_chunk) {
      const part = tokens.slice(at, at + app.prefill_chunk);
      const inputs = { input_ids: runtime.ints(part, [1, part.length]), past_length: runtime.ints([this.past]) };
      if (this.slots) inputs.slots = runtime.ints(part.map((_, i) => this.slots[this.past + i] ?? -1));
      await runtime.run("decoder", this.state, { ...inputs, logit_positions: runtime.ints([part.length - 1]), ...this.extra });
      this.past += part.length;
      this.read.push(...part);
    }
    return this.state.logits.data;
  }
}

/** Penalties, then temperature, top-k, top-p, min-p: in this order, as transformers does. */
class Sampler {
  constructor(how) {
    const { temperature, top_p, min_p, repetition_penalty } = how;
    if (!(temperature >= 0 && top_p > 0 && top_p <= 1 && min_p >= 0 && min_p <= 1 && repetition_penalty > 0)) {
      fail("the sampling means nothing: temperature from 0, top_p above 0 up to 1, min_p from 0 to 1, repetition_penalty above 0");
    }
    this.how = how;
    this.seed = (how.seed ?? Math.floor(Math.random() * 2 ** 32)) >>> 0;
  }

  /** mulberry32 */
  random() {
    this.seed = (this.seed + 0x6d2b79f5) >>> 0;
    let t = Math.imul(this.seed ^ (this.seed >>> 15), 1 | this.seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  }

  pick(given, seen) {
    const { temperature, top_k, top_p, min_p, repetition_penalty, no_repeat_ngram: n } = this.how;
    const plain = temperature === 0 && repetition_penalty === 1 && !n;
    if (plain) return argmax(given);
    const logits = Float64Array.from(given);
    for (const token of repetition_penalty === 1 ? [] : new Set(seen)) {
      logits[token] = logits[token] < 0 ? logits[token] * repetition_penalty : logits[token] / repetition_penalty;
    }
    for (let i = 0; n && i + n <= seen.length; i++) {
      const same = seen.slice(i, i + n - 1).every((token, k) => token === seen[seen.length - n + 1 + k]);
      if (same) logits[seen[i + n - 1]] = -Infinity;
    }
    if (temperature === 0) return argmax(logits);
    const order = [...logits.keys()].sort((a, b) => logits[b] - logits[a] || a - b);
    const least = top_k > 0 && top_k < order.length ? logits[order[top_k - 1]] : -Infinity;
    const scaled = logits.map((logit) => (logit < least ? -Infinity : logit / temperature));
    let chances = softmax(scaled);
    if (top_p < 1) {
      let before = 0;
      for (const i of order) {
        if (before >= top_p) scaled[i] = -Infinity;
        before += chances[i];
      }
      chances = softmax(scaled);
    }
    const floor = min_p * chances[argmax(chances)];
    const kept = order.filter((i) => chances[i] > 0 && chances[i] >= floor);
    let left = this.random() * kept.reduce((sum, i) => sum + chances[i], 0);
    return kept.find((i) => (left -= chances[i]) < 0) ?? kept.at(-1);
  }
}

/** The text of tokens as they come, up to a stop string; half a character, and what may become a stop string, is held back. */
class Writer {
  constructor(runtime, stops) {
    Object.assign(this, { runtime, stops, ids: [], from: 0, shown: 0, held: "", stopped: false });
  }

  put(token) {
    this.ids.push(token);
    if (!this.runtime.tokenizer) return "";
    const piece = this.fresh();
    if (!piece || piece.endsWith("\ufffd")) return "";
    this.from = this.shown;
    this.shown = this.ids.length;
    return this.show(piece, false);
  }

  end() {
    return this.runtime.tokenizer && !this.stopped ? this.show(this.fresh(), true) : "";
  }

  fresh() {
    const known = this.runtime.decode(this.ids.slice(this.from, this.shown));
    return this.runtime.decode(this.ids.slice(this.from)).slice(known.length);
  }

  show(piece, last) {
    const text = this.held + piece;
    const found = this.stops.map((stop) => text.indexOf(stop)).filter((at) => at >= 0);
    this.stopped = found.length > 0;
    let kept = 0;
    for (const stop of last ? [] : this.stops) {
      for (let n = 1; n < stop.length; n++) if (text.endsWith(stop.slice(0, n))) kept = Math.max(kept, n);
    }
    const size = this.stopped ? Math.min(...found) : text.length - kept;
    this.held = text.slice(size);
    return text.slice(0, size);
  }
}

function argmax(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}

function softmax(logits) {
  const most = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = logits.map((logit) => Math.exp(logit - most));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

export function oneLine(error) {
  return String(error?.message ?? error).replace(/\s+/g, " ").slice(0, 300);
}
