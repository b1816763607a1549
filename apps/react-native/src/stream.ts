// One answer under way: a prompt read, then token by token. Contexts of a decoder-decoder are read here, too.
import type { Tensor } from "onnxruntime-common";
import { type App, fail } from "./contract";
import { Calls, type Graph, type Graphs, type Named, type OnnxRuntime, floats, ints } from "./runtime";

/** What a decoder-decoder made of a context: float32 [rows, hidden]. It serves any number of prompts of the same weights. */
export interface Memory {
  readonly fingerprint: string;
  readonly rows: number;
  readonly values: Float32Array;
}

/** An app whose graphs are open. */
export interface Opened {
  readonly ort: OnnxRuntime;
  readonly app: App;
  readonly graphs: Graphs;
}

export function graphOf({ graphs }: Opened, name: string): Graph {
  return graphs[name] ?? fail(`app.json has no graph ${name}; embed the bundle again`);
}

export function requireTokens(ids: readonly number[], vocab: number, whose: string): void {
  if (ids.length === 0) fail(`${whose} has no tokens; give some text`);
  const wrong = ids.find((id) => !Number.isInteger(id) || id < 0 || id >= vocab);
  if (wrong !== undefined) fail(`${whose} has the token ${wrong}, the model has ${vocab}`);
}

export class Stream {
  /** Tokens that the decoder has read. */
  readonly read: number[] = [];
  private readonly logits: Float32Array;
  private readonly logitsOut: Tensor;
  private readonly calls: Calls;

  private constructor(
    private readonly opened: Opened,
    private readonly pending: readonly number[],
    readonly capacity: number,
    private readonly held: Named,
    private readonly slots: readonly number[] | null,
  ) {
    const { ort, app } = opened;
    this.calls = new Calls(ort, graphOf(opened, "decoder"), capacity);
    this.logits = new Float32Array(app.vocab);
    this.logitsOut = floats(ort, this.logits, [1, 1, app.vocab]);
  }

  /** newTokens: the most that will be fed. memory: of a decoder-decoder. */
  static async start(opened: Opened, prompt: readonly number[], newTokens: number, memory: Memory | null): Promise<Stream> {
    const { app } = opened;
    if (app.embedding) fail("this model makes vectors, and generates nothing; use embed");
    requireTokens(prompt, app.vocab, "the prompt");
    if (memory && !app.context) fail("this model keeps no memory of a context; give all of it as the prompt");
    if (memory && memory.fingerprint !== app.fingerprint) fail("the memory was made by other weights; read the context again");
    return app.task === "seq2seq" ? encoded(opened, prompt, newTokens) : spliced(opened, prompt, newTokens, memory);
  }

  static of(opened: Opened, pending: readonly number[], capacity: number, held: Named, slots: readonly number[] | null): Stream {
    return new Stream(opened, pending, capacity, held, slots);
  }

  get past(): number {
    return this.read.length;
  }

  /** Reads the prompt; the logits [vocab] of what comes next, which the next call overwrites. null where `stopped` says so. */
  prefill(stopped: () => boolean = () => false): Promise<Float32Array | null> {
    return this.append(this.pending, stopped);
  }

  async feed(token: number): Promise<Float32Array> {
    return (await this.append([token], () => false)) ?? fail("a token was not read");
  }

  private async append(tokens: readonly number[], stopped: () => boolean): Promise<Float32Array | null> {
    const { ort, app } = this.opened;
    if (this.past + tokens.length > this.capacity) {
      fail(
        `${this.past + tokens.length} tokens do not fit the context of ${this.capacity}; ask for fewer new tokens, or shorten the prompt`,
      );
    }
    for (let at = 0; at < tokens.length; at += app.prefill_chunk) {
      if (stopped()) return null;
      const part = tokens.slice(at, at + app.prefill_chunk);
      const given: Named = {
        ...this.held,
        input_ids: ints(ort, part, [1, part.length]),
        past_length: ints(ort, [this.past]),
        logit_positions: ints(ort, [part.length - 1]),
      };
      const { slots } = this;
      if (slots)
        given["slots"] = ints(
          ort,
          part.map((_, i) => slots[this.past + i] ?? -1),
        );
      await this.calls.run(given, { logits: this.logitsOut });
      this.read.push(...part);
    }
    return this.logits;
  }
}

/** An encoder-decoder: the prompt is the encoder's, the decoder begins with tokens of the model's own. */
async function encoded(opened: Opened, prompt: readonly number[], newTokens: number): Promise<Stream> {
  const { app, ort } = opened;
  if (prompt.length > app.max_context) {
    fail(`the prompt has ${prompt.length} tokens, the model reads at most ${app.max_context}; shorten it`);
  }
  const dims = [1, prompt.length];
  const encoder_mask = new ort.Tensor("bool", new Uint8Array(prompt.length).fill(1), dims);
  const hidden = await graphOf(opened, "encoder").run({ input_ids: ints(ort, prompt, dims), encoder_mask });
  const cross = await graphOf(opened, "cross_kv").run(hidden);
  const first = app.decoder_start ?? fail("app.json has no decoder_start; embed the bundle again");
  const capacity = Math.min(app.max_context, newTokens + 1 + app.forced.length);
  return Stream.of(opened, [first, ...app.forced], capacity, { ...cross, encoder_mask }, null);
}

/** A decoder, with the rows of a memory before the prompt: a token 0 stands for each of them. */
function spliced(opened: Opened, prompt: readonly number[], newTokens: number, memory: Memory | null): Stream {
  const { app, ort } = opened;
  const { context } = app;
  let pending: readonly number[] = prompt;
  let slots: number[] | null = null;
  const held: Named = {};
  if (context) {
    const rows = memory?.rows ?? 0;
    if (rows > context.rows) fail(`the context gives ${rows} rows of memory, the model takes ${context.rows}; give a shorter one`);
    const early = context.splice === "released" && rows > 0 ? 1 : 0;
    const lead = context.prefix.slice(0, context.prefix.length - early);
    slots = [...lead.map(() => -1), ...Array(rows).keys()];
    pending = [...lead, ...Array<number>(rows + early).fill(0), ...prompt];
    const values = rows > 0 && memory ? memory.values : new Float32Array(context.hidden);
    held["memory"] = floats(ort, values, [1, Math.max(1, rows), context.hidden]);
  }
  if (pending.length >= app.max_context) {
    fail(`the prompt has ${pending.length} tokens, the model's context is ${app.max_context}; shorten it`);
  }
  return Stream.of(opened, pending, Math.min(app.max_context, pending.length + newTokens), held, slots);
}

/** The memory of a context of token ids. null where `stopped` says so between two parts. */
export async function readContext(opened: Opened, ids: readonly number[], stopped: () => boolean): Promise<Memory | null> {
  const { app } = opened;
  const context = app.context ?? fail("this model reads no context; give all of it as the prompt");
  requireTokens(ids, context.vocab, "the context");
  const parts: Float32Array[] = [];
  for (let from = 0; from < ids.length; from += context.window) {
    if (stopped()) return null;
    const part = ids.slice(from, from + context.window);
    parts.push(context.tokens.length > 0 ? await remembered(opened, part, context.tokens) : await projected(opened, part));
  }
  const values = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    values.set(part, at);
    at += part.length;
  }
  return { fingerprint: app.fingerprint, rows: values.length / context.hidden, values };
}

async function projected(opened: Opened, part: readonly number[]): Promise<Float32Array> {
  const out = await graphOf(opened, "context").run({ input_ids: ints(opened.ort, part, [1, part.length]) });
  return numbersOf(out["memory"]);
}

/** The outputs of the memory tokens, which are read behind a part. */
async function remembered(opened: Opened, part: readonly number[], tokens: readonly number[]): Promise<Float32Array> {
  const { ort, app } = opened;
  const all = [...part, ...tokens];
  const calls = new Calls(ort, graphOf(opened, "context"), all.length);
  const values: number[] = [];
  for (let at = 0; at < all.length; at += app.prefill_chunk) {
    const read = all.slice(at, at + app.prefill_chunk);
    const wanted = read.map((_, i) => i).filter((i) => at + i >= part.length);
    const out = await calls.run(
      {
        input_ids: ints(ort, read, [1, read.length]),
        past_length: ints(ort, [at]),
        logit_positions: ints(ort, wanted.length > 0 ? wanted : [read.length - 1]),
      },
      {},
    );
    if (wanted.length > 0) values.push(...numbersOf(out["memory"]));
  }
  return Float32Array.from(values);
}

/** The vector of a text of token ids, for a model of embeddings. */
export async function embed(opened: Opened, ids: readonly number[]): Promise<Float32Array> {
  const { app, ort } = opened;
  if (!app.embedding) fail("this model makes no vectors; use generate");
  requireTokens(ids, app.vocab, "the text");
  if (ids.length > app.max_context)
    fail(`the text has ${ids.length} tokens, the model reads at most ${app.max_context}; shorten it`);
  const dims = [1, ids.length];
  const encoder_mask = new ort.Tensor("bool", new Uint8Array(ids.length).fill(1), dims);
  const out = await graphOf(opened, "encoder").run({ input_ids: ints(ort, ids, dims), encoder_mask });
  return numbersOf(out["sentence_embedding"]);
}

function numbersOf(tensor: Tensor | undefined): Float32Array {
  return tensor?.data instanceof Float32Array ? tensor.data : fail("a graph gave no numbers; embed the bundle again");
}
