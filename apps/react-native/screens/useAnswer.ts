// One answer under way: its text as it comes, and how to end it.
import { useCallback, useEffect, useRef, useState } from "react";
import type { AnswerOptions, Model } from "../src";

export interface Said {
  readonly text: string;
  readonly note: string;
  readonly bad: boolean;
}

export const NOTHING: Said = { text: "", note: "", bad: false };

export function useAnswer(model: Model) {
  const [said, setSaid] = useState<Said>(NOTHING);
  const [writing, setWriting] = useState(false);
  const stopping = useRef<AbortController | null>(null);
  useEffect(() => () => stopping.current?.abort(), []);

  /** The answer, also when it failed. prepare: is done first, such as reading a context. */
  const ask = useCallback(
    async (prompt: string, prepare: (signal: AbortSignal) => Promise<AnswerOptions> = async () => ({})): Promise<Said> => {
      const { signal } = (stopping.current = new AbortController());
      let text = "";
      const show = (note: string, bad: boolean): Said => {
        const now = { text, note, bad };
        setSaid(now);
        return now;
      };
      setWriting(true);
      show("", false);
      try {
        const options = await prepare(signal);
        const onText = (piece: string) => {
          text += piece;
          show("", false);
        };
        const { tokens, ending, firstMs, ms } = await model.answer(prompt, { ...options, signal, onText });
        const rate = tokens.length > 1 && ms > 0 ? `, ${((1000 * (tokens.length - 1)) / ms).toFixed(1)} tokens/s` : "";
        return show(`${tokens.length} tokens${rate}; first after ${firstMs.toFixed(0)} ms; ended by: ${ending}`, false);
      } catch (error) {
        return show(error instanceof Error ? error.message : String(error), true);
      } finally {
        setWriting(false);
      }
    },
    [model],
  );
  const stop = useCallback(() => stopping.current?.abort(), []);
  return { said, writing, ask, stop };
}
