// The little of ONNX Runtime that the client uses. onnxruntime-react-native and onnxruntime-node both have it.
import type { InferenceSession, Tensor, TensorConstructor } from "onnxruntime-common";
import { type App, type AppGraph, type State, fail, oneLine } from "./contract";

export interface OnnxRuntime {
  readonly InferenceSession: {
    create(path: string, options?: InferenceSession.SessionOptions): Promise<InferenceSession>;
  };
  readonly Tensor: TensorConstructor;
}

export type Named = Record<string, Tensor>;

// The native side reads a tensor's buffer from its first byte, whatever the view says: every view here is a whole buffer.
const ARRAYS = { float32: Float32Array, int8: Int8Array, int32: Int32Array };

export function ints(ort: OnnxRuntime, values: readonly number[], dims: readonly number[] = [values.length]): Tensor {
  return new ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);
}

export function floats(ort: OnnxRuntime, values: Float32Array, dims: readonly number[]): Tensor {
  const whole = values.byteLength === values.buffer.byteLength ? values : values.slice();
  return new ort.Tensor("float32", whole, dims);
}

function zeros(ort: OnnxRuntime, state: State, capacity: number): Tensor {
  const sizes: Record<string, number> = { batch: 1, capacity };
  const dims = state.shape.map((size) => (typeof size === "number" ? size : (sizes[size] ?? 1)));
  const count = dims.reduce((a, b) => a * b, 1);
  switch (state.dtype) {
    case "float32":
      return new ort.Tensor("float32", new ARRAYS.float32(count), dims);
    case "int8":
      return new ort.Tensor("int8", new ARRAYS.int8(count), dims);
    case "int32":
      return new ort.Tensor("int32", new ARRAYS.int32(count), dims);
    default:
      return fail(`app.json has a state of the type ${state.dtype}, which this client does not know; embed the bundle again`);
  }
}

/** A graph that is open. */
export class Graph {
  private constructor(
    readonly spec: AppGraph,
    private readonly session: InferenceSession,
  ) {}

  /** folder: where its file and the weights lie. Throws an Error of one line. */
  static async open(ort: OnnxRuntime, spec: AppGraph, folder: string, options: InferenceSession.SessionOptions): Promise<Graph> {
    try {
      return new Graph(spec, await ort.InferenceSession.create(`${folder}/${spec.file}`, options));
    } catch (error) {
      return fail(`${spec.file} does not open (it needs ONNX Runtime ${spec.onnxruntime}): ${oneLine(error)}`);
    }
  }

  reads(name: string): boolean {
    return this.session.inputNames.includes(name);
  }

  /** Runs the graph. outputs: tensors that it writes into; the others are made. */
  async run(given: Named, outputs: Named = {}): Promise<Named> {
    const { inputNames, outputNames } = this.session;
    const feeds = inputNames.map(
      (name) => [name, given[name] ?? fail(`${this.spec.file} reads ${name}; embed the bundle again`)] as const,
    );
    const fetches = Object.fromEntries(outputNames.map((name) => [name, outputs[name] ?? null]));
    try {
      return (await this.session.run(Object.fromEntries(feeds), fetches)) as Named;
    } catch (error) {
      return fail(`${this.spec.file} does not run: ${oneLine(error)}`);
    }
  }

  async close(): Promise<void> {
    await this.session.release();
  }
}

/** A graph with states, called again and again. A KV cache is one buffer, written in place; other states have two that change places. */
export class Calls {
  private readonly turns: { given: Named; outputs: Named }[];
  private next = 0;

  constructor(
    ort: OnnxRuntime,
    readonly graph: Graph,
    capacity: number,
  ) {
    const updated = graph.spec.states.filter((state) => state.updated);
    const swaps = updated.some((state) => state.kind !== "kv");
    this.turns = Array.from({ length: swaps ? 2 : 1 }, () => ({ given: {}, outputs: {} }));
    for (const state of updated) {
      const one = zeros(ort, state, capacity);
      const two = state.kind === "kv" ? one : zeros(ort, state, capacity);
      for (const [i, turn] of this.turns.entries()) {
        turn.given[state.name] = i === 0 ? one : two;
        turn.outputs[`${state.name}_out`] = i === 0 ? two : one;
      }
    }
  }

  async run(given: Named, outputs: Named): Promise<Named> {
    const turn = this.turns[this.next % this.turns.length] ?? fail("a graph has no turn");
    this.next += 1;
    return this.graph.run({ ...turn.given, ...given }, { ...turn.outputs, ...outputs });
  }
}

export type Graphs = Readonly<Record<string, Graph>>;

/** All graphs of an app, opened one after another. onStep: is told which. */
export async function openGraphs(
  ort: OnnxRuntime,
  app: App,
  folder: string,
  options: InferenceSession.SessionOptions,
  onStep: (step: string) => void,
): Promise<Graphs> {
  const graphs: Record<string, Graph> = {};
  for (const spec of app.graphs) {
    onStep(`opening ${spec.name}`);
    graphs[spec.name] = await Graph.open(ort, spec, folder, options);
  }
  return graphs;
}
