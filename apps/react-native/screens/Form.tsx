// A prompt and its answer; before it the context of a model that reads one.
import { useRef, useState } from "react";
import { KeyboardAvoidingView, Platform, ScrollView, TextInput } from "react-native";
import type { AnswerOptions, Memory, Model } from "../src";
import { Answered, Ask } from "./parts";
import { type Look, shared } from "./style";
import { useAnswer } from "./useAnswer";

export function Form({ model, look }: { model: Model; look: Look }) {
  const [prompt, setPrompt] = useState("");
  const [context, setContext] = useState("");
  const kept = useRef<{ context: string; memory: Memory } | null>(null);
  const { said, writing, ask, stop } = useAnswer(model);

  /** A context is read once; its memory serves until another is written. */
  async function prepare(signal: AbortSignal): Promise<AnswerOptions> {
    if (context.trim() === "") return {};
    if (kept.current?.context !== context) kept.current = { context, memory: await model.readContext(context, signal) };
    return { memory: kept.current.memory };
  }

  return (
    <KeyboardAvoidingView style={shared.fill} behavior={Platform.OS === "ios" ? "padding" : "height"}>
      <ScrollView style={shared.fill} contentContainerStyle={shared.list} keyboardShouldPersistTaps="handled">
        {model.app.task === "memory" && (
          <TextInput
            style={[shared.context, { backgroundColor: look.card, color: look.text }]}
            value={context}
            placeholder="The text that the questions are about, read once"
            placeholderTextColor={look.quiet}
            onChangeText={setContext}
            multiline
          />
        )}
        <Answered look={look} said={said} writing={writing} />
      </ScrollView>
      <Ask
        look={look}
        value={prompt}
        placeholder={model.app.task === "memory" ? "Question" : "Prompt"}
        writing={writing}
        onChange={setPrompt}
        onSend={() => void (writing || ask(prompt, prepare))}
        onStop={stop}
      />
    </KeyboardAvoidingView>
  );
}
