// The example: opens the model, then a chat, a form for a model without a chat template, or texts compared by their vectors.
import { useEffect, useState } from "react";
import { SafeAreaView, StyleSheet, Text, useColorScheme } from "react-native";
import app from "./model/app.json";
import { Chat } from "./screens/Chat";
import { Compare } from "./screens/Compare";
import { Form } from "./screens/Form";
import { colours } from "./screens/style";
import { type Model, open, readApp } from "./src";

/** Where you serve the folder `model/`. */
const BASE = "https://example.org/model/";

export default function App() {
  const [model, setModel] = useState<Model | null>(null);
  const [status, setStatus] = useState("starting");
  const look = colours(useColorScheme());
  useEffect(() => {
    const stopping = new AbortController();
    const opening = open(readApp(app), {
      base: BASE,
      signal: stopping.signal,
      onProgress: ({ name, loaded, total }) => setStatus(`${name}: ${megabytes(loaded)} of ${megabytes(total)}`),
      onStep: setStatus,
    });
    opening.then(setModel, (error: Error) => setStatus(error.message));
    return () => {
      stopping.abort();
      opening.then((opened) => opened.close()).catch(() => {});
    };
  }, []);
  const Screen = model?.app.embedding ? Compare : model?.app.chat ? Chat : Form;
  return (
    <SafeAreaView style={[styles.page, { backgroundColor: look.back }]}>
      {model ? <Screen model={model} look={look} /> : <Text style={[styles.status, { color: look.quiet }]}>{status}</Text>}
    </SafeAreaView>
  );
}

function megabytes(bytes: number): string {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}

const styles = StyleSheet.create({
  page: { flex: 1 },
  status: { padding: 24, fontSize: 16 },
});
