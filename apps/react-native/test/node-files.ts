// Node's files: what tests, and command lines of yours, open a model with.
import { createHash } from "node:crypto";
import { createReadStream, createWriteStream } from "node:fs";
import { appendFile, mkdir, readFile, rename, rm, stat, statfs, writeFile } from "node:fs/promises";
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";
import type { FileLayer } from "../src/files";

export const nodeFiles: FileLayer = {
  async size(path) {
    return (await stat(path).catch(() => null))?.size ?? null;
  },
  async sha256(path) {
    const hash = createHash("sha256");
    await pipeline(createReadStream(path), hash);
    return hash.digest("hex");
  },
  readText: (path) => readFile(path, "utf8"),
  readBase64: (path) => readFile(path, "base64"),
  writeBase64: (path, data) => writeFile(path, data, "base64"),
  async makeFolder(path) {
    await mkdir(path, { recursive: true });
  },
  move: rename,
  async append(from, to) {
    await appendFile(to, await readFile(from));
  },
  remove: (path) => rm(path, { force: true }),
  async freeBytes() {
    const { bavail, bsize } = await statfs(".");
    return bavail * bsize;
  },
  async fetchPart(url, path, from, to, signal) {
    const headers = { Range: `bytes=${from}-${to - 1}`, "Accept-Encoding": "identity" };
    const response = await fetch(url, { headers, signal: signal ?? null });
    if (response.body) await pipeline(Readable.fromWeb(response.body), createWriteStream(path));
    return response.status;
  },
};
