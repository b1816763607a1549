import { type ColorSchemeName, StyleSheet } from "react-native";

export interface Look {
  readonly back: string;
  readonly card: string;
  readonly text: string;
  readonly quiet: string;
  readonly accent: string;
  readonly onAccent: string;
  readonly bad: string;
}

const LIGHT: Look = {
  back: "#f6f7fb",
  card: "#ffffff",
  text: "#1a1d26",
  quiet: "#5d6475",
  accent: "#3b5bdb",
  onAccent: "#ffffff",
  bad: "#c92a2a",
};
const DARK: Look = {
  back: "#10131a",
  card: "#191d27",
  text: "#e9ecf4",
  quiet: "#9aa3b8",
  accent: "#748ffc",
  onAccent: "#10131a",
  bad: "#ff8787",
};

export function colours(scheme: ColorSchemeName | null | undefined): Look {
  return scheme === "dark" ? DARK : LIGHT;
}

export const shared = StyleSheet.create({
  fill: { flex: 1 },
  list: { padding: 16, gap: 12 },
  card: { borderRadius: 14, padding: 14 },
  words: { fontSize: 16, lineHeight: 23 },
  note: { fontSize: 13 },
  row: { flexDirection: "row", alignItems: "flex-end", gap: 8, padding: 12 },
  input: { flex: 1, borderRadius: 12, paddingHorizontal: 14, paddingVertical: 10, fontSize: 16, maxHeight: 160 },
  context: { borderRadius: 12, padding: 14, fontSize: 16, minHeight: 120, maxHeight: 240, textAlignVertical: "top" },
  button: { borderRadius: 12, paddingHorizontal: 18, paddingVertical: 12, minHeight: 44, justifyContent: "center" },
  label: { fontSize: 16, fontWeight: "600" },
});
