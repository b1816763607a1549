// The model's files: fetched once with progress, hashed, kept in the browser's cache. Damaged weights load without an error in the
// runtime, so every file is hashed each time, also when it comes from the cache.

const CACHE = "edgewright-model";

/** name -> Uint8Array of each file in app.files. onProgress: ({ name, loaded, total, cached }), in bytes of all files. */
export async function loadFiles(app, base, { onProgress = () => {} } = {}) {
  if (!globalThis.crypto?.subtle) throw new Error("the page needs https or localhost: without them a browser hashes nothing");
  const cache = await openCache();
  const total = Object.values(app.files).reduce((sum, fact) => sum + fact.bytes, 0);
  const files = {}, keys = new Set();
  let loaded = 0;
  for (const [name, fact] of Object.entries(app.files)) {
    const key = new URL(`${name}?sha256=${fact.sha256}`, base).href;
    keys.add(key);
    const report = (bytes, cached) => onProgress({ name, loaded: loaded + bytes, total, cached });
    let data = await fromCache(cache, key, fact);
    if (data) {
      report(fact.bytes, true);
    } else {
      data = await fetched(new URL(name, base), name, fact, (bytes) => report(bytes, false));
      await keep(cache, key, data);
    }
    files[name] = data;
    loaded += fact.bytes;
  }
  await dropOthers(cache, new URL(".", base).href, keys);
  return files;
}

async function openCache() {
  try {
    return await caches.open(CACHE);
  } catch {
    return null; // a private window may have none
  }
}

async function fromCache(cache, key, fact) {
  const kept = await cache?.match(key);
  if (!kept) return null;
  const data = new Uint8Array(await kept.arrayBuffer());
  if (data.length === fact.bytes && (await sha256(data)) === fact.sha256) return data;
  await cache.delete(key); // damaged on this device: fetched again
  return null;
}

async function fetched(url, name, fact, onBytes) {
  let response;
  try {
    response = await fetch(url, { cache: "no-store" });
  } catch {
    throw new Error(`${name} cannot be fetched, and this browser has not kept it: connect, then reload`);
  }
  if (!response.ok) throw new Error(`${name} cannot be fetched: the server says ${response.status}`);
  const data = new Uint8Array(fact.bytes);
  let at = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    if (at + value.length > data.length) throw new Error(`${name} has more than the ${fact.bytes} bytes that app.json says: reload`);
    data.set(value, at);
    onBytes((at += value.length));
  }
  if (at !== fact.bytes) throw new Error(`${name} has ${at} bytes of ${fact.bytes}: the download was cut off, reload`);
  if ((await sha256(data)) !== fact.sha256) {
    throw new Error(`${name} is damaged (its SHA-256 is not that of app.json): upload the site again, then reload`);
  }
  return data;
}

async function keep(cache, key, data) {
  try {
    await cache?.put(key, new Response(data));
  } catch {
    // no room: the next visit fetches again
  }
}

/** Files of an older model at the same place. */
async function dropOthers(cache, base, keys) {
  for (const { url } of (await cache?.keys()) ?? []) if (url.startsWith(base) && !keys.has(url)) await cache.delete(url);
}

async function sha256(data) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
