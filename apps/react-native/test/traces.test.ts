// What the bundle answered, step by step, over onnxruntime-node: the same code as on a phone. `npm test` runs it.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import * as ort from "onnxruntime-node";
import { type Traces, readApp } from "../src/contract";
import { Model } from "../src/model";
import { nodeFiles } from "./node-files";

const read = (name: string): unknown => JSON.parse(readFileSync(`model/${name}`, "utf8"));

test("the golden traces pass", async () => {
  const model = await Model.open(readApp(read("app.json")), { folder: "model", files: nodeFiles, ort });
  const traces = read("traces.json") as Traces;
  const { cases, texts, wrong, largest } = await model.checkTraces(traces);
  assert.deepEqual(wrong, []);
  assert.ok(cases > 0);
  console.log(`${cases} traces and ${texts} texts; logits differ by at most ${largest}`);
});
