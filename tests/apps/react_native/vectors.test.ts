// Vectors of a model of embeddings over real ONNX Runtime. EXPECTED names a JSON of what the product says.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import * as ort from "onnxruntime-node";
import { type Traces, readApp } from "../src/contract";
import { Model } from "../src/model";
import { similarity } from "../src/similarity";
import { nodeFiles } from "./node-files";

const read = (name: string): unknown => JSON.parse(readFileSync(name, "utf8"));
const expected = read(process.env["EXPECTED"] ?? "expected.json") as { text: string; prompt: string | null; vector: number[] }[];
const session = { intraOpNumThreads: 1 };
const line = (promise: Promise<unknown>): Promise<string> =>
  promise.then(
    () => "no error",
    (error: Error) => error.message,
  );

test("vectors are the product's", async () => {
  const model = await Model.open(readApp(read("model/app.json")), { folder: "model", files: nodeFiles, ort, session });
  for (const { text, prompt, vector } of expected) {
    const here = await model.embed(text, prompt);
    assert.equal(here.length, vector.length);
    const apart = here.reduce((most, value, i) => Math.max(most, Math.abs(value - vector[i]!)), 0);
    assert.ok(apart < 1e-2, `${text}: ${apart}`);
  }
  const traces = read("model/traces.json") as { vectors: { vector: number[] }[] };
  traces.vectors[0]!.vector[3]! += 0.1;
  assert.equal((await model.checkTraces(traces as unknown as Traces)).wrong.length, 1);
  assert.equal(await line(model.generate("lamp")), "this model makes vectors, and generates nothing; use embed");
  assert.equal(await line(model.embed(" ")), "the text is empty; give some text");
  assert.equal(await line(model.embed("lamp", "x")), "x is no prompt of this model; it has: document, query");
  assert.match(
    await line(model.embed(Array<number>(41).fill(5))),
    /the text has 41 tokens, the model reads at most 40; shorten it/,
  );
  const rows = await model.bench({ pp: 8, repeats: 1 });
  assert.equal(rows.map((row) => row.test).join(), "pp8");
});

test("vectors are compared as the model says", () => {
  const [a, b] = [Float32Array.of(3, 4), Float32Array.of(4, 3)];
  assert.equal(similarity(a, b, "dot"), 24);
  assert.ok(Math.abs(similarity(a, b, "cosine") - 24 / 25) < 1e-6);
  assert.equal(similarity(a, b, "manhattan"), -2);
  assert.ok(Math.abs(similarity(a, b, "euclidean") + Math.SQRT2) < 1e-6);
});
