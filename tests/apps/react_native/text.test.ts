// Text alone: UTF-8 and base64 as node has them; characters of several tokens are never cut. TOKENIZER names a byte-level tokenizer.json.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import type { App } from "../src/contract";
import { Sampler } from "../src/sampler";
import { Text, Writer } from "../src/text";
import { Utf8Decoder, decodeUtf8, fromBase64, toBase64 } from "../src/utf8";

let seed = 7;
const random = (below: number): number => {
  seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
  return Math.floor((seed / 2 ** 32) * below);
};
const TEXTS = ["🙂 👩‍👩‍👧 🇩🇪!", "日本語のテキスト", "naïve café", "½ of ²", "plain", "한국어 и русский"];

test("UTF-8 is read as node's TextDecoder reads it", () => {
  const node = new TextDecoder("utf-8", { ignoreBOM: true });
  for (let code = 0; code < 0x110000; code++) {
    if (code >= 0xd800 && code < 0xe000) continue;
    const bytes = Buffer.from(String.fromCodePoint(code));
    assert.equal(decodeUtf8(bytes), String.fromCodePoint(code));
  }
  const leads = [
    0x00, 0x41, 0x7f, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc0, 0xc1, 0xc2, 0xdf, 0xe0, 0xed, 0xef, 0xf0, 0xf4, 0xf5, 0xff,
  ];
  for (let i = 0; i < 50_000; i++) {
    const bytes = Uint8Array.from({ length: random(9) }, () => leads[random(leads.length)]!);
    assert.equal(decodeUtf8(bytes), node.decode(bytes), String(bytes));
  }
  const marked = Uint8Array.of(0xef, 0xbb, 0xbf, 0x41);
  assert.equal(new Utf8Decoder().decode(marked), new TextDecoder().decode(marked));
  assert.equal(new Utf8Decoder("utf-8", { ignoreBOM: true }).decode(marked), node.decode(marked));
});

test("base64 is as node has it", () => {
  for (let size = 0; size < 300; size++) {
    const bytes = Uint8Array.from({ length: size }, () => random(256));
    const text = Buffer.from(bytes).toString("base64");
    assert.equal(toBase64(bytes), text);
    assert.deepEqual(fromBase64(text), bytes);
  }
  assert.equal(fromBase64("A*"), null);
});

test("no piece ends within a character", () => {
  const app = { tokenizer: { unknown: null } } as unknown as App;
  const engines = globalThis as { TextDecoder: unknown };
  const own = engines.TextDecoder;
  for (const decoder of [own, undefined]) {
    engines.TextDecoder = decoder; // undefined: an engine without one
    const text = new Text(app, readFileSync(process.env["TOKENIZER"] ?? "", "utf8"));
    for (const whole of TEXTS) {
      const ids = text.encode(whole);
      assert.equal(text.decode(ids), whole);
      const writer = new Writer(text, []);
      const pieces = [...ids.map((id) => writer.put(id)), writer.end()];
      assert.equal(pieces.join(""), whole);
      assert.ok(
        pieces.every((piece) => !piece.includes("\ufffd")),
        whole,
      );
      const cut = new Writer(text, []); // an answer that ends within a character keeps what is whole
      const first = ids.slice(0, -1).map((id) => cut.put(id));
      assert.ok(first.every((piece) => !piece.includes("\ufffd")));
      const held = new Writer(text, ["zzz", whole.slice(-1)]);
      assert.equal(ids.map((id) => held.put(id)).join("") + held.end(), whole.slice(0, whole.indexOf(whole.slice(-1))));
    }
  }
  engines.TextDecoder = own;
});

test("tokens are drawn as the sampling says", () => {
  const how = { temperature: 1, top_p: 1, top_k: 0, min_p: 0, repetition_penalty: 1, no_repeat_ngram: 0, seed: 3 };
  const logits = Float32Array.from([0, 1, 2, 3].map((p) => Math.log(p / 6)));
  const drawn = (more: object, count = 6000, seen: number[] = []): number[] => {
    const sampler = new Sampler({ ...how, ...more });
    const counts = [0, 0, 0, 0];
    for (let i = 0; i < count; i++) counts[sampler.pick(logits, seen)]! += 1;
    return counts;
  };
  for (const [i, count] of drawn({}).entries()) assert.ok(Math.abs(count - 1000 * i) < 150, `${i}: ${count}`);
  assert.deepEqual(drawn({ top_k: 2 }).map((n) => n > 0), [false, false, true, true]); // prettier-ignore
  assert.deepEqual(drawn({ top_p: 0.5 }).map((n) => n > 0), [false, false, false, true]); // prettier-ignore
  assert.deepEqual(drawn({ min_p: 0.5 }).map((n) => n > 0), [false, false, true, true]); // prettier-ignore
  assert.deepEqual(drawn({ temperature: 0 }), [0, 0, 0, 6000]);
  assert.deepEqual(drawn({ temperature: 0, no_repeat_ngram: 2 }, 10, [1, 3, 1]), [0, 0, 10, 0]);
  assert.deepEqual(drawn({ temperature: 0, no_repeat_ngram: 1 }, 10, [3, 2]), [0, 10, 0, 0]);
  assert.deepEqual(drawn({ temperature: 0, repetition_penalty: 100 }, 10, [3, 2]), [0, 10, 0, 0]);
});
