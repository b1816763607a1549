// The model's files on the device: fetched piece by piece, so that a broken download goes on where it was, and hashed.
import { type App, type FileFact, fail, oneLine } from "./contract";
import type { FileLayer } from "./files";

export interface Progress {
  readonly name: string;
  readonly loaded: number;
  readonly total: number;
  /** Whether the file was on the device already. */
  readonly cached: boolean;
}

export interface InstallOptions {
  /** Where the files of `model/` are served, ending in "/"; without it they must be in the folder. */
  readonly base?: string | undefined;
  /** Damaged weights load without an error, so every file is hashed each time. false: only fetched ones are. */
  readonly check?: boolean | undefined;
  /** Bytes asked for at once: what a broken download loses at most. */
  readonly piece?: number | undefined;
  readonly onProgress?: ((progress: Progress) => void) | undefined;
  readonly signal?: AbortSignal | undefined;
}

const PIECE = 8 << 20;
const busy = new Set<string>();

/** Makes the folder hold all files of the app, whole. Throws an Error of one line; what was fetched until then is kept. */
export async function install(app: App, folder: string, files: FileLayer, options: InstallOptions = {}): Promise<void> {
  if (busy.has(folder)) fail(`${folder} is being filled already; wait for that`);
  busy.add(folder);
  try {
    await files.makeFolder(folder);
    await fill(app, folder, files, options);
  } finally {
    busy.delete(folder);
  }
}

async function fill(app: App, folder: string, files: FileLayer, options: InstallOptions): Promise<void> {
  const names = Object.entries(app.files);
  const total = names.reduce((sum, [, fact]) => sum + fact.bytes, 0);
  const missing: [string, FileFact][] = [];
  let loaded = 0;
  for (const [name, fact] of names) {
    const fault = await faultOf(`${folder}/${name}`, name, fact, files, options.check ?? true);
    if (fault === null) {
      loaded += fact.bytes;
      options.onProgress?.({ name, loaded, total, cached: true });
    } else if (options.base === undefined) {
      fail(`${fault}: copy the model again, or give the address that it is fetched from`);
    } else {
      missing.push([name, fact]);
    }
  }
  await requireRoom(missing, folder, files);
  for (const [name, fact] of missing) {
    const onBytes = (bytes: number) => options.onProgress?.({ name, loaded: loaded + bytes, total, cached: false });
    await fetchFile(folder, name, fact, files, options, onBytes);
    loaded += fact.bytes;
  }
}

/** What is wrong with a file of the folder; null for nothing. */
async function faultOf(path: string, name: string, fact: FileFact, files: FileLayer, check: boolean): Promise<string | null> {
  const size = await files.size(path);
  if (size === null) return `${name} is missing`;
  if (size !== fact.bytes) return `${name} has ${size} bytes of ${fact.bytes}`;
  if (check && (await files.sha256(path)) !== fact.sha256) return `${name} is damaged (its SHA-256 is not that of app.json)`;
  return null;
}

async function requireRoom(missing: readonly [string, FileFact][], folder: string, files: FileLayer): Promise<void> {
  const free = missing.length > 0 ? await files.freeBytes() : null;
  let needed = 0;
  for (const [name, fact] of missing)
    needed += fact.bytes - Math.min(fact.bytes, (await files.size(partOf(folder, name, fact))) ?? 0);
  if (free !== null && needed > free)
    fail(`the model takes ${needed} more bytes, and ${free} are free on this device: free some space`);
}

/** Bears the hash, so that the pieces of two versions never meet. */
function partOf(folder: string, name: string, fact: FileFact): string {
  return `${folder}/${name}.${fact.sha256.slice(0, 16)}.part`;
}

async function fetchFile(
  folder: string,
  name: string,
  fact: FileFact,
  files: FileLayer,
  options: InstallOptions,
  onBytes: (bytes: number) => void,
): Promise<void> {
  const part = partOf(folder, name, fact);
  const piece = `${part}.piece`;
  const url = `${options.base}${name}`;
  let at = (await files.size(part)) ?? 0;
  if (at > fact.bytes) {
    await files.remove(part);
    at = 0;
  }
  while (at < fact.bytes) {
    const to = Math.min(fact.bytes, at + (options.piece ?? PIECE));
    const status = await fetchPart(url, piece, at, to, name, fact, files, options.signal);
    const got = (await files.size(piece)) ?? 0;
    if (status === 206 && got > 0 && got <= to - at) {
      await files.append(piece, part);
      at += got;
    } else if (status === 200 && got === fact.bytes) {
      await files.remove(part); // the server knows no ranges, and sent all
      await files.move(piece, part);
      at = got;
    } else if (status === 200 || status === 206) {
      await files.remove(piece);
      fail(
        `${name} came with ${got} bytes where ${status === 206 ? to - at : fact.bytes} were due: the download was cut off, try again`,
      );
    } else {
      await files.remove(piece);
      fail(`${name} cannot be fetched: the server says ${status}`);
    }
    onBytes(at);
  }
  await files.remove(piece);
  if (fact.bytes > 0 && (await files.sha256(part)) !== fact.sha256) {
    await files.remove(part);
    fail(`${name} is damaged (its SHA-256 is not that of app.json): upload the model again`);
  }
  await files.remove(`${folder}/${name}`);
  await files.move(part, `${folder}/${name}`);
}

async function fetchPart(
  url: string,
  piece: string,
  from: number,
  to: number,
  name: string,
  fact: FileFact,
  files: FileLayer,
  signal: AbortSignal | undefined,
): Promise<number> {
  if (signal?.aborted)
    fail(`the download was cancelled at ${from} of ${fact.bytes} bytes of ${name}: the next one goes on from there`);
  try {
    return await files.fetchPart(url, piece, from, to, signal);
  } catch (error) {
    await files.remove(piece);
    if (signal?.aborted)
      fail(`the download was cancelled at ${from} of ${fact.bytes} bytes of ${name}: the next one goes on from there`);
    return fail(`${name} was cut off at ${from} of ${fact.bytes} bytes (${oneLine(error)}): the next try goes on from there`);
  }
}
