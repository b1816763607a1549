// The device's files by react-native-blob-util: nothing large passes through JavaScript.
import blobs from "react-native-blob-util";
import { fail } from "./contract";
import type { FileLayer } from "./files";

/** A folder of the app's own, which stays until the app is removed. */
export const documents: string = blobs.fs.dirs.DocumentDir;

export const nativeFiles: FileLayer = {
  async size(path) {
    return (await blobs.fs.exists(path)) ? Number((await blobs.fs.stat(path)).size) : null;
  },
  async sha256(path) {
    return (await blobs.fs.hash(path, "sha256")).toLowerCase();
  },
  async readText(path) {
    return String(await blobs.fs.readFile(path, "utf8"));
  },
  async readBase64(path) {
    return String(await blobs.fs.readFile(path, "base64"));
  },
  async writeBase64(path, data) {
    await blobs.fs.writeFile(path, data, "base64");
  },
  async makeFolder(path) {
    if (!(await blobs.fs.isDir(path))) await blobs.fs.mkdir(path);
  },
  async move(from, to) {
    await blobs.fs.mv(from, to);
  },
  async append(from, to) {
    if (!(await blobs.fs.exists(to))) await blobs.fs.createFile(to, "", "utf8");
    await blobs.fs.appendFile(to, from, "uri");
  },
  async remove(path) {
    if (await blobs.fs.exists(path)) await blobs.fs.unlink(path);
  },
  async freeBytes() {
    const { free, internal_free } = await blobs.fs.df();
    const bytes = Number(internal_free ?? free);
    return Number.isFinite(bytes) ? bytes : null;
  },
  async fetchPart(url, path, from, to, signal) {
    await this.remove(path);
    const asked = blobs.config({ path }).fetch("GET", url, { Range: `bytes=${from}-${to - 1}`, "Accept-Encoding": "identity" });
    const cancel = () => void asked.cancel();
    signal?.addEventListener("abort", cancel);
    try {
      const { status } = (await asked).info();
      return signal?.aborted ? fail("cancelled") : status;
    } finally {
      signal?.removeEventListener("abort", cancel);
    }
  },
};
