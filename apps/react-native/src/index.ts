export { type App, type Sampling, type Traces, readApp } from "./contract";
export { open, type DeviceOptions } from "./device";
export { type FileLayer, loadMemory, saveMemory } from "./files";
export { type Answer, type AnswerOptions, type BenchRow, type Ending, Model, type OpenOptions } from "./model";
export { documents, nativeFiles } from "./native-files";
export type { OnnxRuntime } from "./runtime";
export { similarity } from "./similarity";
export type { Progress } from "./store";
export type { Memory } from "./stream";
