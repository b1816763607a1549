// UTF-8 for engines without a TextDecoder, which the tokenizer's library wants.

/** Bytes to text; each longest part that is no UTF-8 is one U+FFFD, as the encoding standard says. */
export function decodeUtf8(bytes: Uint8Array): string {
  const out: string[] = [];
  let at = 0;
  while (at < bytes.length) {
    const first = bytes[at++] as number;
    if (first < 0x80) {
      out.push(String.fromCharCode(first));
      continue;
    }
    const more = first >= 0xc2 && first <= 0xdf ? 1 : first >= 0xe0 && first <= 0xef ? 2 : first >= 0xf0 && first <= 0xf4 ? 3 : 0;
    let low = first === 0xe0 ? 0xa0 : first === 0xf0 ? 0x90 : 0x80;
    let high = first === 0xed ? 0x9f : first === 0xf4 ? 0x8f : 0xbf;
    let value = first & (0x3f >> more);
    let left = more;
    while (left > 0) {
      const byte = bytes[at];
      if (byte === undefined || byte < low || byte > high) break;
      value = (value << 6) | (byte & 0x3f);
      [low, high, left, at] = [0x80, 0xbf, left - 1, at + 1];
    }
    out.push(more > 0 && left === 0 ? String.fromCodePoint(value) : "\ufffd");
  }
  return out.join("");
}

/** What @huggingface/tokenizers uses of a TextDecoder: whole arrays, errors replaced. */
export class Utf8Decoder {
  private readonly ignoreBOM: boolean;

  constructor(_label = "utf-8", options: { ignoreBOM?: boolean } = {}) {
    this.ignoreBOM = options.ignoreBOM ?? false;
  }

  decode(bytes: Uint8Array): string {
    const text = decodeUtf8(bytes);
    return !this.ignoreBOM && text.startsWith("\ufeff") ? text.slice(1) : text;
  }
}

/** Gives the engine a TextDecoder where it has none. */
export function provideTextDecoder(): void {
  const engine = globalThis as { TextDecoder?: unknown };
  engine.TextDecoder ??= Utf8Decoder;
}

const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

export function toBase64(bytes: Uint8Array): string {
  const out: string[] = [];
  for (let at = 0; at < bytes.length; at += 3) {
    const left = bytes.length - at;
    const word = ((bytes[at] ?? 0) << 16) | ((bytes[at + 1] ?? 0) << 8) | (bytes[at + 2] ?? 0);
    for (let i = 0; i < 4; i++) out.push(i <= left ? (LETTERS[(word >> (18 - 6 * i)) & 63] as string) : "=");
  }
  return out.join("");
}

/** null for what is no base64. */
export function fromBase64(text: string): Uint8Array | null {
  const letters = text.replace(/[\r\n]/g, "").replace(/={1,2}$/, "");
  const out = new Uint8Array(Math.floor((letters.length * 3) / 4));
  let word = 0;
  let bits = 0;
  let at = 0;
  for (const letter of letters) {
    const value = LETTERS.indexOf(letter);
    if (value < 0) return null;
    word = ((word << 6) | value) & 0xffffff;
    bits += 6;
    if (bits >= 8) {
      bits -= 8;
      out[at++] = (word >> bits) & 255;
    }
  }
  return out;
}
