// Answers over real ONNX Runtime: streaming, cancelling, one call at a time, what is refused. EXPECTED names a JSON of what the product says.
import assert from "node:assert/strict";
import { cpSync, mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import * as ort from "onnxruntime-node";
import { type Traces, readApp } from "../src/contract";
import { loadMemory, saveMemory } from "../src/files";
import { Model, type OpenOptions } from "../src/model";
import type { Memory } from "../src/stream";
import { nodeFiles } from "./node-files";

interface Expected {
  readonly prompt: string;
  readonly context: string | null;
  readonly said: string;
}

const read = (name: string): unknown => JSON.parse(readFileSync(name, "utf8"));
const app = readApp(read("model/app.json"));
const traces = read("model/traces.json") as Traces;
const expected = read(process.env["EXPECTED"] ?? "expected.json") as Expected[];
const first = expected[0]!;
const open = (options: Partial<OpenOptions> = {}, made = app) =>
  Model.open(made, { folder: "model", files: nodeFiles, ort, session: { intraOpNumThreads: 1 }, ...options });
const line = (promise: Promise<unknown>): Promise<string> =>
  promise.then(
    () => "no error",
    (error: Error) => error.message,
  );
const memoryOf = async (model: Model, { context }: Expected): Promise<{ memory?: Memory }> =>
  context === null ? {} : { memory: await model.readContext(context) };
/** The recorded prompt with the longest answer, and the memory that it wants. */
async function longest(model: Model) {
  const trace = traces.cases.reduce((a, b) => (b.steps.length > a.steps.length ? b : a));
  const memory = trace.context.length > 0 ? await model.readContext(trace.context) : null;
  return { ids: trace.ids, size: trace.steps.length, memory };
}
const greedy = { temperature: 0, top_p: 1, top_k: 0, min_p: 0 };

test("answers are the product's, whole and piece by piece", async () => {
  const model = await open();
  for (const one of expected) {
    const pieces: string[] = [];
    const options = { ...(await memoryOf(model, one)), sampling: greedy };
    assert.equal(await model.generate(one.prompt, { ...options, onText: (piece) => pieces.push(piece) }), one.said);
    const streamed: string[] = [];
    for await (const piece of model.stream(one.prompt, options)) streamed.push(piece);
    assert.deepEqual(streamed, pieces);
    assert.equal(pieces.join(""), one.said);
    assert.ok(pieces.every((piece) => piece !== ""));
  }
});

test("a memory is kept in a file and serves again", { skip: app.task !== "memory" }, async () => {
  const model = await open();
  const memory = await model.readContext(first.context!);
  const file = join(mkdtempSync(join(tmpdir(), "edgewright-")), "memory");
  await saveMemory(nodeFiles, file, memory);
  const kept = await loadMemory(nodeFiles, file);
  assert.deepEqual(kept, memory);
  assert.equal(await model.generate(first.prompt, { memory: kept, sampling: greedy }), first.said);
  assert.match(await line(model.generate("k", { memory: { ...kept, fingerprint: "0" } })), /the memory was made by other weights/);
  const long = { ...kept, rows: app.context!.rows + 1 };
  assert.match(await line(model.generate("k", { memory: long })), /rows of memory, the model takes/);
  for (const damage of [readFileSync(file).subarray(0, -4), Buffer.from("{}\n"), Buffer.from("no"), Buffer.alloc(0)]) {
    writeFileSync(file, damage);
    assert.match(await line(loadMemory(nodeFiles, file)), /is no memory of a context; read the context again and save it$/);
  }
  assert.match(await line(loadMemory(nodeFiles, `${file}-missing`)), /is no memory of a context/);
  const stopping = new AbortController();
  stopping.abort();
  assert.equal(await line(model.readContext(first.context!, stopping.signal)), "the reading of the context was cancelled");
});

test("a model without a memory says so", { skip: app.task === "memory" }, async () => {
  const model = await open();
  assert.match(await line(model.readContext("k")), /this model reads no context; give all of it as the prompt/);
  const memory = { fingerprint: app.fingerprint, rows: 1, values: new Float32Array(1) };
  assert.match(await line(model.generate("k", { memory })), /keeps no memory of a context/);
});

test("a second call meanwhile is refused, a cancelled one ends, the model answers again", async () => {
  const model = await open();
  const stopping = new AbortController();
  const { ids, memory } = await longest(model);
  const long = { memory, sampling: greedy, maxNewTokens: 24, onText: () => stopping.abort(), signal: stopping.signal };
  const answering = model.answer(ids, long);
  assert.equal(model.busy, true);
  assert.match(await line(model.answer(ids)), /answering already; wait for that answer, or cancel it/);
  const answer = await answering;
  assert.equal(answer.ending, "cancelled");
  assert.ok(answer.tokens.length < 24);
  assert.equal((await model.answer(ids, { signal: stopping.signal })).tokens.length, 0); // before it begins
  let pieces = 0;
  for await (const _ of model.stream(ids, { memory, sampling: greedy })) if (++pieces === 1) break;
  assert.equal(model.busy, false);
  assert.equal(pieces, 1);
});

test("answers end where they are told", async () => {
  const model = await open();
  const { ids, size, memory } = await longest(model);
  const two = await model.answer(ids, { memory, sampling: greedy, maxNewTokens: 2 });
  assert.equal(two.ending, "limit");
  assert.deepEqual(two.tokens.length, 2);
  assert.equal(two.promptTokens, ids.length);
  const whole = await model.generate(ids, { memory, sampling: greedy, maxNewTokens: size });
  const stop = whole.slice(2, 5);
  const stopped = await model.answer(ids, { memory, sampling: greedy, maxNewTokens: size, stops: [stop] });
  assert.equal(stopped.text, whole.slice(0, whole.indexOf(stop)));
  assert.equal(stopped.ending, "stop");
  const seeded = () => model.generate(ids, { sampling: { temperature: 2, top_k: 8, top_p: 0.9, seed: 7 } });
  assert.equal(await seeded(), await seeded());
});

test("a full context ends an answer, a prompt that fills it is refused", async () => {
  const model = await open();
  const ids = Array<number>(app.max_context + 1).fill(traces.cases[0]!.ids[0]!);
  const want = app.task === "seq2seq" ? "the model reads at most" : "the model's context is";
  assert.match(await line(model.answer(ids)), new RegExp(`the prompt has \\d+ tokens, ${want} ${app.max_context}; shorten it`));
  if (app.task !== "seq2seq") {
    const most = app.max_context - 1 - (app.context?.prefix.length ?? 0);
    const full = await model.answer(ids.slice(0, most), { sampling: greedy, maxNewTokens: 30 });
    assert.ok(full.ending === "context" || full.ending === "end");
    assert.ok(full.tokens.length <= 2);
  }
});

test("mistakes are one line", async () => {
  const model = await open();
  assert.equal(await line(model.answer("  ")), "the prompt is empty; give some text");
  assert.match(await line(model.answer([])), /the prompt has no tokens/);
  assert.match(
    await line(model.answer([app.vocab])),
    new RegExp(`the prompt has the token ${app.vocab}, the model has ${app.vocab}`),
  );
  assert.match(await line(model.answer([5], { maxNewTokens: 0 })), /0 new tokens were asked for/);
  assert.match(await line(model.answer([5], { stops: [""] })), /an empty stop string/);
  assert.match(await line(model.answer([5], { sampling: { top_p: 0 } })), /the sampling means nothing/);
  const asked = async () => {
    for await (const _ of model.stream("  ")) assert.fail();
  };
  assert.equal(await line(asked()), "the prompt is empty; give some text");
  assert.match(
    await line(open({ mostMemory: 1000 })),
    new RegExp(`takes about ${app.memory.total} bytes of memory, and 1000 are there`),
  );
  assert.throws(() => readApp({ schema_version: 2 }), /app.json is of another version/);
  assert.throws(() => readApp({ schema_version: 1 }), /not as it was written/);
  await model.close();
  assert.match(await line(model.answer("k")), /the model was closed; open it again/);
});

test("a model without a tokenizer takes token ids", async () => {
  const model = await open({}, { ...app, tokenizer: null });
  const answer = await model.answer(traces.cases[0]!.ids, { sampling: greedy, maxNewTokens: 3 });
  assert.equal(answer.text, "");
  assert.match(await line(model.answer("k")), /has no tokenizer: give it token ids/);
});

test("a damaged graph does not open, and a wrong trace is found", async () => {
  const folder = mkdtempSync(join(tmpdir(), "edgewright-"));
  cpSync("model", folder, { recursive: true });
  const { file } = app.graphs[0]!;
  writeFileSync(join(folder, file), readFileSync(`model/${file}`).subarray(0, 1000));
  assert.match(await line(open({ folder })), new RegExp(`^${file} has 1000 bytes of \\d+: copy the model again`));
  const files = { ...app.files, [file]: { ...app.files[file]!, bytes: 1000 } };
  assert.match(
    await line(open({ folder, check: false }, { ...app, files })),
    new RegExp(`^${file} does not open \\(it needs ONNX Runtime`),
  );
  const model = await open();
  const wrong = structuredClone(traces) as unknown as {
    cases: { text: string; steps: { token: number; top: [number, number][] }[] }[];
    texts: { ids: number[] }[];
  };
  const [[best]] = traces.cases[0]!.steps[1]!.top as [[number, number]];
  const other = best === 5 ? 6 : 5;
  wrong.cases[0]!.steps[1] = { token: other, top: [[other, 100], [best, 0]] }; // prettier-ignore
  wrong.cases[1]!.text = "no";
  wrong.texts[0]!.ids = [7];
  const found = (await model.checkTraces(wrong as unknown as Traces)).wrong;
  for (const start of ["trace 0, step 1: ", "trace 1: another text", "text "]) {
    assert.ok(found.some((one) => one.startsWith(start)), found.join("\n")); // prettier-ignore
  }
});

test("the bench gives rows", async () => {
  const model = await open();
  const rows = await model.bench({ pp: 8, tg: 4, repeats: 1 });
  assert.deepEqual(rows.map((row) => row.test), ["pp8", "tg4"]); // prettier-ignore
  assert.ok(rows.every((row) => row.tokensPerSecond > 0));
});
