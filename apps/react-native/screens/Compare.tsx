// Texts by their vectors: how alike each one is to those before it.
import { useRef, useState } from "react";
import { KeyboardAvoidingView, Platform, ScrollView } from "react-native";
import { type Model, similarity } from "../src";
import { Answered, Ask } from "./parts";
import { type Look, shared } from "./style";
import { NOTHING, type Said } from "./useAnswer";

export function Compare({ model, look }: { model: Model; look: Look }) {
  const [text, setText] = useState("");
  const [said, setSaid] = useState<Said>(NOTHING);
  const [reading, setReading] = useState(false);
  const kept = useRef<{ text: string; vector: Float32Array }[]>([]);

  async function send() {
    const asked = text.trim();
    if (reading || !model.app.embedding) return;
    const kind = model.app.embedding.similarity;
    setReading(true);
    try {
      const vector = await model.embed(asked);
      const others = kept.current.map((other) => ({ text: other.text, like: similarity(vector, other.vector, kind) }));
      const lines = others.sort((a, b) => b.like - a.like).map((other) => `${other.like.toFixed(3)}  ${other.text}`);
      kept.current.push({ text: asked, vector });
      setText("");
      setSaid({ text: [asked, "", ...lines].join("\n"), note: `${vector.length} numbers; by ${kind}`, bad: false });
    } catch (error) {
      setSaid({ text: "", note: error instanceof Error ? error.message : String(error), bad: true });
    } finally {
      setReading(false);
    }
  }

  return (
    <KeyboardAvoidingView style={shared.fill} behavior={Platform.OS === "ios" ? "padding" : "height"}>
      <ScrollView style={shared.fill} contentContainerStyle={shared.list} keyboardShouldPersistTaps="handled">
        <Answered look={look} said={said} writing={reading} />
      </ScrollView>
      <Ask
        look={look}
        value={text}
        placeholder="Text"
        writing={false}
        onChange={setText}
        onSend={() => void send()}
        onStop={() => {}}
      />
    </KeyboardAvoidingView>
  );
}
