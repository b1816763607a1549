// The model on a phone: onnxruntime-react-native and the device's own files.
import * as ort from "onnxruntime-react-native";
import type { App } from "./contract";
import { Model, type OpenOptions } from "./model";
import { documents, nativeFiles } from "./native-files";

export type DeviceOptions = Omit<OpenOptions, "ort" | "files" | "folder"> & { readonly folder?: string };

/** Opens the model; folder: one of its own under the app's documents. Throws an Error of one line. */
export function open(app: App, options: DeviceOptions): Promise<Model> {
  return Model.open(app, {
    folder: `${documents}/edgewright/${app.fingerprint.slice(0, 16)}`,
    ...options,
    ort,
    files: nativeFiles,
  });
}
