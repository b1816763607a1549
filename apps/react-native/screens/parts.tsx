import { Pressable, Text, TextInput, View } from "react-native";
import { type Look, shared } from "./style";
import type { Said } from "./useAnswer";

export function Ask(props: {
  look: Look;
  value: string;
  placeholder: string;
  writing: boolean;
  onChange: (text: string) => void;
  onSend: () => void;
  onStop: () => void;
}) {
  const { look, writing } = props;
  const background = { backgroundColor: writing ? look.bad : look.accent };
  return (
    <View style={shared.row}>
      <TextInput
        style={[shared.input, { backgroundColor: look.card, color: look.text }]}
        value={props.value}
        placeholder={props.placeholder}
        placeholderTextColor={look.quiet}
        onChangeText={props.onChange}
        onSubmitEditing={props.onSend}
        autoCapitalize="none"
        autoCorrect={false}
        multiline
      />
      <Pressable accessibilityRole="button" style={[shared.button, background]} onPress={writing ? props.onStop : props.onSend}>
        <Text style={[shared.label, { color: look.onAccent }]}>{writing ? "Stop" : "Send"}</Text>
      </Pressable>
    </View>
  );
}

export function Answered({ look, said, writing }: { look: Look; said: Said; writing: boolean }) {
  return (
    <View style={[shared.card, { backgroundColor: look.card }]} accessibilityLiveRegion="polite">
      <Text selectable style={[shared.words, { color: look.text }]}>
        {said.text + (writing ? "▍" : "")}
      </Text>
      {said.note !== "" && <Text style={[shared.note, { color: said.bad ? look.bad : look.quiet }]}>{said.note}</Text>}
    </View>
  );
}
