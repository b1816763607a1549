// How a token is drawn.
import { type Sampling, fail } from "./contract";

/** A token whose chance is below e^-40 of the best one's is never drawn, so that a large vocabulary is not sorted whole. */
const FAR = 40;

/** Penalties, then temperature, top-k, top-p, min-p: in this order, as transformers does. */
export class Sampler {
  private state: number;

  constructor(private readonly how: Sampling) {
    const { temperature, top_p, min_p, repetition_penalty } = how;
    if (!(temperature >= 0 && top_p > 0 && top_p <= 1 && min_p >= 0 && min_p <= 1 && repetition_penalty > 0)) {
      fail("the sampling means nothing: temperature from 0, top_p above 0 up to 1, min_p from 0 to 1, repetition_penalty above 0");
    }
    this.state = (how.seed ?? Math.floor(Math.random() * 2 ** 32)) >>> 0;
  }

  /** seen: all tokens that the decoder has read. */
  pick(given: Float32Array, seen: readonly number[]): number {
    const { temperature, repetition_penalty, no_repeat_ngram: n } = this.how;
    if (temperature === 0 && repetition_penalty === 1 && n === 0) return argmax(given);
    const logits = Float64Array.from(given);
    if (repetition_penalty !== 1) {
      for (const token of new Set(seen)) {
        const logit = logits[token] ?? 0;
        logits[token] = logit < 0 ? logit * repetition_penalty : logit / repetition_penalty;
      }
    }
    for (const token of n > 0 ? ngramEnds(seen, n) : []) logits[token] = -Infinity;
    return temperature === 0 ? argmax(logits) : this.draw(logits);
  }

  private draw(logits: Float64Array): number {
    const { temperature, top_k, top_p, min_p } = this.how;
    const best = logits[argmax(logits)] ?? 0;
    let left: { token: number; chance: number }[] = [];
    logits.forEach((logit, token) => {
      const below = (best - logit) / temperature;
      if (below <= FAR) left.push({ token, chance: Math.exp(-below) });
    });
    left.sort((a, b) => b.chance - a.chance || a.token - b.token);
    if (top_k > 0 && top_k < left.length) {
      const least = left[top_k - 1]?.chance ?? 0;
      left = left.filter(({ chance }) => chance >= least);
    }
    const sum = left.reduce((total, { chance }) => total + chance, 0);
    let before = 0;
    left = left.filter(({ chance }) => {
      const kept = before < top_p * sum;
      before += chance;
      return kept;
    });
    left = left.filter(({ chance }) => chance >= min_p * (left[0]?.chance ?? 0));
    let rest = this.random() * left.reduce((total, { chance }) => total + chance, 0);
    for (const { token, chance } of left) {
      rest -= chance;
      if (rest < 0) return token;
    }
    return left.at(-1)?.token ?? fail("no token is left to draw; loosen the sampling");
  }

  /** mulberry32, from 0 up to 1. */
  private random(): number {
    this.state = (this.state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(this.state ^ (this.state >>> 15), 1 | this.state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  }
}

/** The tokens that would end a run of n that has been seen. */
function ngramEnds(seen: readonly number[], n: number): number[] {
  const ends: number[] = [];
  const last = seen.slice(seen.length - n + 1);
  for (let i = 0; i + n <= seen.length; i++) {
    const end = seen[i + n - 1];
    if (end !== undefined && last.every((token, k) => token === seen[i + k])) ends.push(end);
  }
  return ends;
}

export function argmax(values: Float32Array | Float64Array): number {
  let best = 0;
  let most = -Infinity;
  for (let i = 0; i < values.length; i++) {
    const value = values[i] as number;
    if (value > most) {
      most = value;
      best = i;
    }
  }
  return best;
}
