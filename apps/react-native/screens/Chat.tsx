// Questions and answers below one another; each question is asked for itself.
import { useState } from "react";
import { FlatList, KeyboardAvoidingView, Platform, Text, View } from "react-native";
import type { Model } from "../src";
import { Answered, Ask } from "./parts";
import { type Look, shared } from "./style";
import { NOTHING, type Said, useAnswer } from "./useAnswer";

interface Turn {
  readonly key: string;
  readonly question: string;
  /** null while it is written. */
  readonly answer: Said | null;
}

export function Chat({ model, look }: { model: Model; look: Look }) {
  const [turns, setTurns] = useState<readonly Turn[]>([]);
  const [prompt, setPrompt] = useState("");
  const { said, writing, ask, stop } = useAnswer(model);

  async function send() {
    const question = prompt.trim();
    if (question === "" || writing) return;
    const key = String(turns.length);
    setPrompt("");
    setTurns((before) => [...before, { key, question, answer: null }]);
    const answer = await ask(question);
    setTurns((before) => before.map((turn) => (turn.key === key ? { ...turn, answer } : turn)));
  }

  return (
    <KeyboardAvoidingView style={shared.fill} behavior={Platform.OS === "ios" ? "padding" : "height"}>
      <FlatList
        style={shared.fill}
        contentContainerStyle={shared.list}
        data={turns}
        extraData={said}
        renderItem={({ item }) => (
          <View style={{ gap: 8 }}>
            <Text style={[shared.words, { color: look.accent }]}>{item.question}</Text>
            <Answered look={look} said={item.answer ?? (writing ? said : NOTHING)} writing={item.answer === null && writing} />
          </View>
        )}
      />
      <Ask look={look} value={prompt} placeholder="Message" writing={writing} onChange={setPrompt} onSend={send} onStop={stop} />
    </KeyboardAvoidingView>
  );
}
