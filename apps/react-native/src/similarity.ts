import type { EmbeddingSpec } from "./contract";

/** How alike two vectors are, as the model's makers compare them: the more, the more alike. */
export function similarity(a: Float32Array, b: Float32Array, kind: EmbeddingSpec["similarity"]): number {
  const dot = (x: Float32Array, y: Float32Array) => x.reduce((sum, value, i) => sum + value * (y[i] ?? 0), 0);
  if (kind === "dot") return dot(a, b);
  if (kind === "cosine") return dot(a, b) / Math.max(1e-30, Math.sqrt(dot(a, a) * dot(b, b)));
  const apart = a.map((value, i) => value - (b[i] ?? 0));
  return -(kind === "manhattan" ? apart.reduce((sum, value) => sum + Math.abs(value), 0) : Math.sqrt(dot(apart, apart)));
}
