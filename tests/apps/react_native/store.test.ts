// Downloads against a server on the loopback: whole, cut off and gone on with, without ranges, damaged, cancelled, no room.
import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, readdirSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, beforeEach, test } from "node:test";
import { readApp } from "../src/contract";
import type { FileLayer } from "../src/files";
import { type Progress, install } from "../src/store";
import { nodeFiles } from "./node-files";
import { type Serving, serve, whole } from "./server";

const app = readApp(JSON.parse(readFileSync("model/app.json", "utf8")));
const names = Object.keys(app.files).sort();
const bytes = app.files["weights.bin"]!.bytes;
const piece = Math.ceil(bytes / 5);
let serving: Serving;
let folder: string;

before(async () => {
  serving = await serve("model");
});
after(() => serving.server.close());
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "edgewright-"));
  serving.answering = whole;
  serving.asked.length = 0;
});

const line = (promise: Promise<unknown>): Promise<string> =>
  promise.then(
    () => "no error",
    (error: Error) => error.message,
  );
const fill = (options: object = {}, files: FileLayer = nodeFiles) =>
  install(app, folder, files, { base: serving.base, piece, ...options });
const filled = () => {
  assert.deepEqual(readdirSync(folder).sort(), names);
  for (const name of names) assert.ok(readFileSync(join(folder, name)).equals(readFileSync(`model/${name}`)), name);
};
const ofWeights = () => serving.asked.filter((one) => one.startsWith("weights.bin"));

test("files come in pieces, with progress, and are not fetched again", async () => {
  const seen: Progress[] = [];
  await fill({ onProgress: (progress: Progress) => seen.push(progress) });
  filled();
  assert.equal(ofWeights().length, 5);
  assert.ok(seen.every((one, i) => i === 0 || one.loaded >= seen[i - 1]!.loaded));
  assert.equal(seen.at(-1)!.loaded, seen.at(-1)!.total);
  assert.ok(seen.every((one) => !one.cached));
  serving.asked.length = 0;
  const again: boolean[] = [];
  await fill({ onProgress: ({ cached }: Progress) => again.push(cached) });
  assert.deepEqual([serving.asked, again.every(Boolean), again.length], [[], true, names.length]);
});

test("a download that is cut off goes on where it was", async () => {
  serving.answering = (response, data, from, to, request) => {
    if (!request.url!.endsWith("weights.bin") || from < 2 * piece) return whole(response, data, from, to, request);
    response.writeHead(206, { "Content-Length": to - from });
    response.write(data.subarray(from, from + 100), () => response.destroy());
  };
  assert.match(
    await line(fill()),
    new RegExp(`^weights.bin was cut off at ${2 * piece} of ${bytes} bytes \\(.*\\): the next try goes on from there$`),
  );
  assert.ok(!readdirSync(folder).includes("weights.bin"));
  serving.answering = whole;
  serving.asked.length = 0;
  await fill();
  filled();
  assert.deepEqual(ofWeights()[0], `weights.bin ${2 * piece}-${3 * piece}`);
  assert.equal(ofWeights().length, 3);
});

test("a part that is longer than the file, or of another version, is not gone on with", async () => {
  const part = join(folder, `weights.bin.${app.files["weights.bin"]!.sha256.slice(0, 16)}.part`);
  writeFileSync(part, Buffer.alloc(bytes + 1));
  await fill();
  filled();
  rmSync(join(folder, "weights.bin"));
  writeFileSync(part, Buffer.alloc(piece, 1)); // of the right length, with other contents
  assert.match(await line(fill()), /^weights.bin is damaged \(its SHA-256 is not that of app.json\): upload the model again$/);
  await fill();
  filled();
});

test("a server that sends less than was asked is asked on; one that sends nothing is named", async () => {
  serving.answering = (response, data, from, to, request) =>
    whole(response, data, from, Math.min(to, from + Math.ceil(piece / 2)), request);
  await fill();
  filled();
  assert.ok(ofWeights().length >= 10);
  rmSync(join(folder, "weights.bin"));
  serving.answering = (response) => response.writeHead(206).end();
  assert.match(await line(fill()), /^weights.bin came with 0 bytes where \d+ were due: the download was cut off, try again$/);
});

test("a server without ranges gives all at once, or too little", async () => {
  serving.answering = (response, data) => response.writeHead(200).end(data);
  await fill();
  filled();
  assert.equal(ofWeights().length, 1);
  rmSync(join(folder, "weights.bin"));
  serving.answering = (response, data) => response.writeHead(200).end(data.subarray(0, bytes - 1));
  assert.equal(
    await line(fill()),
    `weights.bin came with ${bytes - 1} bytes where ${bytes} were due: the download was cut off, try again`,
  );
  serving.answering = (response) => response.writeHead(404).end("no");
  assert.equal(await line(fill()), "weights.bin cannot be fetched: the server says 404");
  serving.server.closeAllConnections();
});

test("a damaged file is fetched again, or named where there is no address", async () => {
  await fill();
  const weights = join(folder, "weights.bin");
  const data = readFileSync(weights);
  data[4096]! ^= 1;
  writeFileSync(weights, data);
  const alone = { base: undefined };
  assert.match(
    await line(fill(alone)),
    /^weights.bin is damaged \(its SHA-256 is not that of app.json\): copy the model again, or give the address/,
  );
  assert.equal(await line(fill({ ...alone, check: false })), "no error");
  serving.asked.length = 0;
  await fill();
  filled();
  assert.equal(serving.asked.length, 5);
  truncateSync(weights, bytes - 1);
  assert.match(await line(fill(alone)), new RegExp(`^weights.bin has ${bytes - 1} bytes of ${bytes}: copy`));
  rmSync(weights);
  assert.match(await line(fill(alone)), /^weights.bin is missing: copy/);
});

test("a file that the server damaged is refused", async () => {
  serving.answering = (response, data, from, to, request) => {
    const other = Buffer.from(data);
    other[4096]! ^= 1;
    whole(response, other, from, to, request);
  };
  assert.match(await line(fill()), /is damaged \(its SHA-256 is not that of app.json\): upload the model again$/);
});

test("a download is cancelled, and goes on", async () => {
  const stopping = new AbortController();
  serving.answering = (response, data, from, to, request) => {
    if (request.url!.endsWith("weights.bin") && from === 3 * piece) {
      response.writeHead(206, { "Content-Length": to - from });
      response.write(data.subarray(from, from + 10), () => stopping.abort());
      return;
    }
    whole(response, data, from, to, request);
  };
  assert.match(
    await line(fill({ signal: stopping.signal })),
    new RegExp(`^the download was cancelled at ${3 * piece} of ${bytes} bytes of weights.bin`),
  );
  serving.answering = whole;
  serving.asked.length = 0;
  await fill();
  filled();
  assert.equal(ofWeights().length, 2);
});

test("two at once are refused, and no room is said before anything is fetched", async () => {
  const first = fill();
  assert.match(await line(fill()), /is being filled already; wait for that$/);
  await first;
  filled();
  rmSync(join(folder, "weights.bin"));
  serving.asked.length = 0;
  const full: FileLayer = { ...nodeFiles, freeBytes: async () => 1000 };
  assert.equal(
    await line(fill({}, full)),
    `the model takes ${bytes} more bytes, and 1000 are free on this device: free some space`,
  );
  assert.deepEqual(serving.asked, []);
});

test("an unreachable server is one line", async () => {
  assert.match(
    await line(fill({ base: "http://127.0.0.1:9/" })),
    /was cut off at 0 of \d+ bytes \(.*\): the next try goes on from there$/,
  );
});
