// Text to tokens and back, by @huggingface/tokenizers, and the text of an answer as it comes.
import { Tokenizer } from "@huggingface/tokenizers";
import { type App, fail } from "./contract";
import { provideTextDecoder } from "./utf8";

export class Text {
  private readonly tokenizer: Tokenizer;

  /** json: the contents of tokenizer.json. */
  constructor(
    private readonly app: App,
    json: string,
  ) {
    provideTextDecoder();
    this.tokenizer = new Tokenizer(JSON.parse(json) as object, {});
  }

  /** The tokens of a text, without what stands around a prompt. */
  encode(text: string): number[] {
    if (text === "") return [];
    const unknown = this.app.tokenizer?.unknown ?? null;
    // A vocabulary of whole words gives undefined for others.
    const ids = this.tokenizer.encode(text, { add_special_tokens: false }).ids as (number | undefined)[];
    return ids.map((id) => id ?? unknown).filter((id) => id !== null);
  }

  decode(ids: readonly number[]): string {
    if (ids.length === 0) return "";
    return this.tokenizer.decode([...ids], { skip_special_tokens: true, clean_up_tokenization_spaces: false });
  }

  /** The tokens of a text for a model of embeddings, behind one of its prompts; what is too long is cut. */
  readText(text: string, promptName: string | null): number[] {
    const { embedding, tokenizer, max_context: most } = this.app;
    if (!embedding || !tokenizer) fail("this model makes no vectors; use generate");
    if (text.trim() === "") fail("the text is empty; give some text");
    const name = promptName ?? embedding.default_prompt;
    const known = Object.keys(embedding.prompts);
    if (name !== null && !known.includes(name)) fail(`${name} is no prompt of this model; it has: ${known.join(", ") || "none"}`);
    const whole = (name === null ? "" : embedding.prompts[name]) + text;
    const inner = this.encode(embedding.lower_case ? whole.toLowerCase() : whole);
    const room = Math.max(0, most - tokenizer.before.length - tokenizer.after.length);
    return [...tokenizer.before, ...inner.slice(0, room), ...tokenizer.after].slice(0, most);
  }

  /** The tokens of a prompt, through the chat template where the model has one. */
  readPrompt(prompt: string, chat: boolean): number[] {
    const { app } = this;
    if (prompt.trim() === "") fail("the prompt is empty; give some text");
    let ids: number[];
    if (chat && app.chat) {
      const { before, after, trims } = app.chat;
      if (before === null || after === null) fail("the chat template takes no lone question; pass chat: false, or token ids");
      ids = this.encode(before + (trims ? prompt.trim() : prompt) + after);
    } else {
      ids = [...(app.tokenizer?.before ?? []), ...this.encode(prompt), ...(app.tokenizer?.after ?? [])];
    }
    const bos = app.tokenizer?.bos ?? null;
    return bos !== null && ids[0] === bos && ids[1] === bos ? ids.slice(1) : ids;
  }
}

/** The text of tokens as they come, up to a stop string; half a character, and what may become a stop string, is held back. */
export class Writer {
  stopped = false;
  private readonly ids: number[] = [];
  private from = 0;
  private shown = 0;
  private held = "";

  constructor(
    private readonly text: Text | null,
    private readonly stops: readonly string[],
  ) {}

  put(token: number): string {
    this.ids.push(token);
    const piece = this.fresh();
    if (piece === "" || piece.endsWith("\ufffd")) return "";
    this.from = this.shown;
    this.shown = this.ids.length;
    return this.show(piece, false);
  }

  /** What was held back, at the end of an answer. */
  end(): string {
    return this.stopped ? "" : this.show(this.fresh(), true);
  }

  private fresh(): string {
    if (!this.text) return "";
    const known = this.text.decode(this.ids.slice(this.from, this.shown));
    return this.text.decode(this.ids.slice(this.from)).slice(known.length);
  }

  private show(piece: string, last: boolean): string {
    const text = this.held + piece;
    const found = this.stops.map((stop) => text.indexOf(stop)).filter((at) => at >= 0);
    this.stopped = found.length > 0;
    let kept = 0;
    for (const stop of last ? [] : this.stops) {
      for (let n = 1; n < stop.length; n++) if (text.endsWith(stop.slice(0, n))) kept = Math.max(kept, n);
    }
    const size = this.stopped ? Math.min(...found) : text.length - kept;
    this.held = text.slice(size);
    return text.slice(0, size);
  }
}
