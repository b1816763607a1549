// What app.json and traces.json hold (docs/app.schema.json, docs/traces.schema.json of Edgewright).

export type ElementType = "float32" | "int8" | "int32";

export interface Port {
  readonly name: string;
  readonly dtype: string;
  readonly shape: readonly (number | string)[];
}

/** What a graph carries from call to call; one that is not updated is the output of another graph. */
export interface State extends Port {
  readonly kind: string;
  readonly updated: boolean;
}

export interface AppGraph {
  readonly name: string;
  readonly file: string;
  readonly inputs: readonly Port[];
  readonly outputs: readonly Port[];
  readonly states: readonly State[];
  readonly onnxruntime: string;
}

export interface FileFact {
  readonly sha256: string;
  readonly bytes: number;
}

export interface ContextSpec {
  readonly window: number;
  readonly hidden: number;
  readonly rows: number;
  readonly vocab: number;
  readonly tokens: readonly number[];
  readonly prefix: readonly number[];
  readonly splice: "exact" | "released";
}

/** What the graph `encoder` makes of a text: one vector. */
export interface EmbeddingSpec {
  readonly size: number;
  readonly normalised: boolean;
  readonly similarity: "cosine" | "dot" | "euclidean" | "manhattan";
  readonly prompts: Readonly<Record<string, string>>;
  readonly default_prompt: string | null;
  readonly lower_case: boolean;
}

/** How a token is drawn; temperature 0 is the best one. */
export interface Sampling {
  readonly temperature: number;
  readonly top_p: number;
  readonly top_k: number;
  readonly min_p: number;
  readonly repetition_penalty: number;
  readonly no_repeat_ngram: number;
  readonly seed?: number;
}

export interface App {
  readonly schema_version: 1;
  readonly name: string;
  readonly model_type: string;
  readonly task: "seq2seq" | "causal" | "memory" | "embed";
  readonly bits: number;
  readonly graphs: readonly AppGraph[];
  readonly decoder_start: number | null;
  readonly forced: readonly number[];
  readonly vocab: number;
  readonly max_context: number;
  readonly max_new_tokens: number;
  readonly prefill_chunk: number;
  readonly context: ContextSpec | null;
  readonly embedding: EmbeddingSpec | null;
  readonly sampling: Sampling;
  readonly stops: { readonly tokens: readonly number[]; readonly strings: readonly string[] };
  readonly tokenizer: {
    readonly file: string;
    readonly before: readonly number[];
    readonly after: readonly number[];
    readonly bos: number | null;
    readonly unknown: number | null;
  } | null;
  readonly chat: { readonly before: string | null; readonly after: string | null; readonly trims: boolean } | null;
  readonly memory: { readonly weights: number; readonly states: number; readonly total: number };
  readonly fingerprint: string;
  readonly files: Readonly<Record<string, FileFact>>;
}

export interface Traces {
  readonly schema_version: 1;
  readonly new_tokens: number;
  readonly tolerance: number;
  readonly cases: readonly {
    readonly ids: readonly number[];
    readonly context: readonly number[];
    readonly steps: readonly { readonly token: number; readonly top: readonly (readonly [number, number])[] }[];
    readonly ending: "end" | "limit" | "context";
    readonly text: string | null;
  }[];
  readonly vectors: readonly {
    readonly text: string | null;
    readonly ids: readonly number[];
    readonly vector: readonly number[];
  }[];
  readonly texts: readonly { readonly text: string; readonly ids: readonly number[]; readonly decoded: string }[];
}

/** Ends what is under way with one line that says what was found and the way out. */
export function fail(line: string): never {
  throw new Error(line);
}

/** Any error as one short line. */
export function oneLine(error: unknown): string {
  const text = error instanceof Error ? error.message : String(error);
  return text.replace(/\s+/g, " ").slice(0, 300);
}

/** app.json as `import app from "./model/app.json"` gives it. Throws an Error of one line if it is none that this client reads. */
export function readApp(value: unknown): App {
  const app = value as Partial<App> | null;
  if (typeof app !== "object" || app === null || app.schema_version !== 1) {
    fail("app.json is of another version: embed the bundle again");
  }
  if (!Array.isArray(app.graphs) || typeof app.files !== "object" || typeof app.fingerprint !== "string") {
    fail("app.json is not as it was written: copy the folder again");
  }
  return app as App;
}
