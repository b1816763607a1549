// The model: prompts in, text out, one call at a time.
import type { InferenceSession } from "onnxruntime-common";
import { type App, type Sampling, type Traces, fail, oneLine } from "./contract";
import type { FileLayer } from "./files";
import { type OnnxRuntime, openGraphs } from "./runtime";
import { Sampler, argmax } from "./sampler";
import { type InstallOptions, install } from "./store";
import { type Memory, type Opened, Stream, embed, readContext } from "./stream";
import { Text, Writer } from "./text";

export interface OpenOptions extends InstallOptions {
  /** Where the files lie, or are put: a folder of this model's own. */
  readonly folder: string;
  readonly files: FileLayer;
  readonly ort: OnnxRuntime;
  /** Bytes that the app may take: a model that needs more is refused before anything is fetched. */
  readonly mostMemory?: number | undefined;
  readonly session?: InferenceSession.SessionOptions | undefined;
  /** Is told what is done after the files are there. */
  readonly onStep?: ((step: string) => void) | undefined;
}

export interface AnswerOptions {
  readonly maxNewTokens?: number | undefined;
  /** Default: as the model's makers have it. */
  readonly sampling?: Partial<Sampling> | undefined;
  /** Strings that end the answer; not part of it. */
  readonly stops?: readonly string[] | undefined;
  /** Through the chat template, where the model has one. Default: yes. */
  readonly chat?: boolean | undefined;
  /** Of a decoder-decoder: what `readContext` gave. */
  readonly memory?: Memory | null | undefined;
  /** Is given each piece of text when it is whole characters. */
  readonly onText?: ((piece: string) => void) | undefined;
  /** Ends the answer before its next token. */
  readonly signal?: AbortSignal | undefined;
}

/** An end token, as many tokens as were asked for, no room left, a stop string, the signal. */
export type Ending = "end" | "limit" | "context" | "stop" | "cancelled";

export interface Answer {
  readonly text: string;
  readonly tokens: readonly number[];
  readonly ending: Ending;
  readonly promptTokens: number;
  /** Until the first token. */
  readonly firstMs: number;
  /** From then on. */
  readonly ms: number;
}

export interface BenchRow {
  readonly test: string;
  readonly tokensPerSecond: number;
  readonly std: number;
  readonly repeats: number;
}

const { performance } = globalThis as { performance?: { now(): number } };
const now = (): number => performance?.now() ?? Date.now();

export class Model {
  private isBusy = false;
  private closed = false;

  private constructor(
    private readonly opened: Opened,
    private readonly text: Text | null,
  ) {}

  /** Fetches what is missing, hashes all, opens the graphs. Throws an Error of one line. */
  static async open(app: App, options: OpenOptions): Promise<Model> {
    const { folder, files, ort, mostMemory, onStep = () => {} } = options;
    if (mostMemory !== undefined && app.memory.total > mostMemory) {
      fail(`${app.name} takes about ${app.memory.total} bytes of memory, and ${mostMemory} are there; export it with fewer --bits`);
    }
    await install(app, folder, files, options);
    const text = app.tokenizer ? new Text(app, await files.readText(`${folder}/${app.tokenizer.file}`)) : null;
    const graphs = await openGraphs(ort, app, folder, { logSeverityLevel: 3, ...options.session }, onStep);
    return new Model({ ort, app, graphs }, text);
  }

  get app(): App {
    return this.opened.app;
  }

  get busy(): boolean {
    return this.isBusy;
  }

  /** The tokens of a text, without what stands around a prompt. */
  encode(text: string): number[] {
    return this.reader().encode(text);
  }

  decode(ids: readonly number[]): string {
    return this.reader().decode(ids);
  }

  /** The text that follows a prompt (a text, or token ids). */
  async generate(prompt: string | readonly number[], options: AnswerOptions = {}): Promise<string> {
    return (await this.answer(prompt, options)).text;
  }

  answer(prompt: string | readonly number[], options: AnswerOptions = {}): Promise<Answer> {
    return this.alone(() => this.write(prompt, options, () => options.signal?.aborted ?? false));
  }

  /** The pieces of an answer as they come: `for await (const piece of model.stream(prompt))`. Leaving the loop cancels. */
  stream(prompt: string | readonly number[], options: AnswerOptions = {}): AsyncIterable<string> {
    return { [Symbol.asyncIterator]: () => this.pieces(prompt, options) };
  }

  /** The vector of a text, or of token ids, for a model of embeddings. promptName: of the model's own prompts; null is its default. */
  embed(text: string | readonly number[], promptName: string | null = null): Promise<Float32Array> {
    return this.alone(() => embed(this.opened, typeof text === "string" ? this.reader().readText(text, promptName) : text));
  }

  /** What a decoder-decoder makes of a context; pass it as `memory` to any number of prompts. */
  async readContext(context: string | readonly number[], signal?: AbortSignal): Promise<Memory> {
    return this.alone(async () => {
      const ids = typeof context === "string" ? this.encode(context) : context;
      const memory = await readContext(this.opened, ids, () => signal?.aborted ?? false);
      return memory ?? fail("the reading of the context was cancelled");
    });
  }

  /** Feeds the recorded tokens: the lines of what differs by a clear margin, and the largest difference of logits. */
  checkTraces(traces: Traces): Promise<{ cases: number; texts: number; wrong: string[]; largest: number }> {
    return this.alone(async () => {
      const wrong: string[] = [];
      let largest = 0;
      for (const [number, trace] of traces.cases.entries()) {
        const memory = trace.context.length > 0 ? await readContext(this.opened, trace.context, () => false) : null;
        const stream = await Stream.start(this.opened, trace.ids, traces.new_tokens, memory);
        let logits = (await stream.prefill()) ?? fail("a prompt was not read");
        for (const [i, { token, top }] of trace.steps.entries()) {
          const best = argmax(logits);
          for (const [other, logit] of top) largest = Math.max(largest, Math.abs((logits[other] ?? NaN) - logit));
          const recorded = new Map(top).get(best) ?? top.at(-1)?.[1] ?? 0;
          const margin = (top[0]?.[1] ?? 0) - recorded;
          if (best !== token && margin > traces.tolerance) {
            wrong.push(`trace ${number}, step ${i}: token ${best}, recorded ${token}`);
            break;
          }
          if (i + 1 < trace.steps.length) logits = await stream.feed(token);
        }
        const said = trace.steps.map((step) => step.token).slice(0, trace.ending === "end" ? -1 : undefined);
        if (trace.text !== null && this.decode(said) !== trace.text) wrong.push(`trace ${number}: another text`);
      }
      for (const [number, { text, ids, vector }] of traces.vectors.entries()) {
        const here = await embed(this.opened, ids);
        const apart = here.reduce((most, value, i) => Math.max(most, Math.abs(value - (vector[i] ?? NaN))), 0);
        largest = Math.max(largest, apart);
        if (!(apart <= traces.tolerance) || here.length !== vector.length) wrong.push(`vector ${number}: ${apart} apart`);
        if (text !== null && this.reader().readText(text, null).join() !== ids.join()) wrong.push(`vector ${number}: other tokens`);
      }
      for (const { text, ids, decoded } of traces.texts) {
        const [here, back] = [this.encode(text), this.decode(ids)];
        if (here.join() !== ids.join()) wrong.push(`text ${JSON.stringify(text)}: tokens ${here.join()}, recorded ${ids.join()}`);
        else if (back !== decoded) wrong.push(`text ${JSON.stringify(text)}: read back as ${JSON.stringify(back)}`);
      }
      return { cases: traces.cases.length + traces.vectors.length, texts: traces.texts.length, wrong, largest };
    });
  }

  /** Tokens read (pp) and generated behind one token (tg) a second, warm. */
  bench({ pp = 64, tg = 32, repeats = 3, onRow = (_: BenchRow): void => {} } = {}): Promise<BenchRow[]> {
    return this.alone(async () => {
      const most = this.app.max_context - 1;
      const token = Math.floor(this.app.vocab / 2);
      const [reading, writing] = [Math.min(pp, most), Math.min(tg, most - 1)];
      const read = async () => {
        const began = now();
        const ids = Array<number>(reading).fill(token);
        await (this.app.embedding ? embed(this.opened, ids) : (await Stream.start(this.opened, ids, 1, null)).prefill());
        return (1000 * reading) / (now() - began);
      };
      const write = async () => {
        const stream = await Stream.start(this.opened, [token], writing + 1, null);
        await stream.prefill();
        const began = now();
        for (let i = 0; i < writing; i++) await stream.feed(token);
        return (1000 * writing) / (now() - began);
      };
      const rows: BenchRow[] = [];
      const timed = [[`pp${reading}`, read] as const, [`tg${writing}`, write] as const];
      for (const [test, once] of timed.slice(0, this.app.embedding ? 1 : 2)) {
        await once(); // the first run does not count
        const rates: number[] = [];
        for (let i = 0; i < repeats; i++) rates.push(await once());
        const mean = rates.reduce((a, b) => a + b, 0) / repeats;
        const std = Math.sqrt(rates.reduce((a, b) => a + (b - mean) ** 2, 0) / repeats);
        const row = { test, tokensPerSecond: mean, std, repeats };
        rows.push(row);
        onRow(row);
      }
      return rows;
    });
  }

  /** Gives the memory back. */
  close(): Promise<void> {
    return this.alone(async () => {
      this.closed = true;
      for (const graph of Object.values(this.opened.graphs)) await graph.close();
    });
  }

  private reader(): Text {
    return this.text ?? fail(`${this.app.name} has no tokenizer: give it token ids`);
  }

  private async alone<T>(call: () => Promise<T>): Promise<T> {
    if (this.closed) fail("the model was closed; open it again");
    if (this.isBusy) fail("the model is answering already; wait for that answer, or cancel it");
    this.isBusy = true;
    try {
      return await call();
    } finally {
      this.isBusy = false;
    }
  }

  private async write(prompt: string | readonly number[], options: AnswerOptions, stopped: () => boolean): Promise<Answer> {
    const { app } = this;
    const began = now();
    const ids = typeof prompt === "string" ? this.reader().readPrompt(prompt, options.chat ?? true) : prompt;
    const most = Math.min(options.maxNewTokens ?? app.max_new_tokens, app.max_context - 1);
    const sampler = new Sampler({ ...app.sampling, ...options.sampling });
    const stops = [...app.stops.strings, ...(options.stops ?? [])];
    if (!(most >= 1)) fail("0 new tokens were asked for; ask for 1 or more");
    if (stops.includes("")) fail("an empty stop string would stop before the first letter; give some text");
    const writer = new Writer(this.text, stops);
    const stream = await Stream.start(this.opened, ids, most, options.memory ?? null);
    const tokens: number[] = [];
    let text = "";
    let first: number | null = null;
    const tell = (piece: string) => {
      text += piece;
      if (piece !== "") options.onText?.(piece);
    };
    const done = (ending: Ending): Answer => {
      if (ending !== "cancelled") tell(writer.end());
      const ended = now();
      const times = { firstMs: (first ?? ended) - began, ms: ended - (first ?? ended) };
      return { text, tokens, ending: writer.stopped ? "stop" : ending, promptTokens: ids.length, ...times };
    };
    for (let logits = await stream.prefill(stopped); ;) {
      if (logits === null || stopped()) return done("cancelled");
      const token = sampler.pick(logits, stream.read);
      first ??= now();
      if (app.stops.tokens.includes(token)) return done("end");
      tokens.push(token);
      tell(writer.put(token));
      if (writer.stopped) return done("stop");
      if (tokens.length === most) return done("limit");
      if (stream.past >= stream.capacity) return done("context");
      if (stopped()) return done("cancelled");
      logits = await stream.feed(token);
    }
  }

  private pieces(prompt: string | readonly number[], options: AnswerOptions): AsyncIterator<string> {
    const ready: string[] = [];
    let left = false;
    let ended = false;
    let error: unknown = null;
    let wake = () => {};
    const onText = (piece: string) => {
      ready.push(piece);
      options.onText?.(piece);
      wake();
    };
    const stopped = () => left || (options.signal?.aborted ?? false);
    const answering = this.alone(() => this.write(prompt, { ...options, onText }, stopped))
      .catch((reason: unknown) => (error = reason))
      .finally(() => {
        ended = true;
        wake();
      });
    return {
      async next() {
        while (ready.length === 0 && !ended) await new Promise<void>((resolve) => (wake = resolve));
        const piece = ready.shift();
        if (piece !== undefined) return { done: false, value: piece };
        if (error !== null) throw new Error(oneLine(error));
        return { done: true, value: undefined };
      },
      async return() {
        left = true;
        await answering;
        return { done: true, value: undefined };
      },
    };
  }
}
