// What the client needs of a device's files: native-files.ts has it by react-native-blob-util, node-files.ts by node.
import { fail } from "./contract";
import type { Memory } from "./stream";
import { fromBase64, toBase64 } from "./utf8";

/** Paths are plain, without file://. */
export interface FileLayer {
  /** Bytes of a file; null where there is none. */
  size(path: string): Promise<number | null>;
  /** Lower-case hex. */
  sha256(path: string): Promise<string>;
  readText(path: string): Promise<string>;
  readBase64(path: string): Promise<string>;
  writeBase64(path: string, data: string): Promise<void>;
  makeFolder(path: string): Promise<void>;
  /** Moves a file to a place where none is. */
  move(from: string, to: string): Promise<void>;
  /** `to`, made where it is missing, grows by the bytes of `from`. */
  append(from: string, to: string): Promise<void>;
  /** Where there is no such file, nothing is done. */
  remove(path: string): Promise<void>;
  /** Bytes that are free; null where that is not known. */
  freeBytes(): Promise<number | null>;
  /**
   * Asks a server for the bytes from `from` up to `to` of a file, and writes what it sends into `path`, in place of what is there.
   * The HTTP status. Rejects where the connection fails, or `signal` says so.
   */
  fetchPart(url: string, path: string, from: number, to: number, signal?: AbortSignal): Promise<number>;
}

const HEAD = "edgewright.memory";

/** Keeps a memory in a file, so that the context is not read again. */
export async function saveMemory(files: FileLayer, path: string, memory: Memory): Promise<void> {
  const { values } = memory;
  const head = `${JSON.stringify({ [HEAD]: memory.fingerprint, rows: memory.rows, bytes: values.byteLength })}\n`;
  const whole = new Uint8Array(head.length + values.byteLength);
  for (let i = 0; i < head.length; i++) whole[i] = head.charCodeAt(i);
  whole.set(new Uint8Array(values.buffer, values.byteOffset, values.byteLength), head.length);
  await files.writeBase64(path, toBase64(whole));
}

/** A memory that was kept. Throws an Error of one line for any other file. */
export async function loadMemory(files: FileLayer, path: string): Promise<Memory> {
  const line = `${path} is no memory of a context; read the context again and save it`;
  const whole = (await files.size(path)) === null ? null : fromBase64(await files.readBase64(path));
  const end = whole?.indexOf(10) ?? -1;
  if (whole === null || end < 0) fail(line);
  let head: Record<string, unknown>;
  try {
    head = JSON.parse(String.fromCharCode(...whole.subarray(0, Math.min(end, 4096)))) as Record<string, unknown>;
  } catch {
    return fail(line);
  }
  const { rows, bytes, [HEAD]: fingerprint } = head;
  const values = whole.slice(end + 1);
  if (typeof rows !== "number" || typeof fingerprint !== "string" || bytes !== values.length || values.length % 4 !== 0) fail(line);
  return { fingerprint, rows, values: new Float32Array(values.buffer) };
}
