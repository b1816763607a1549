// A server on the loopback for the tests: ranges, and all that goes wrong with a download.
import { readFileSync } from "node:fs";
import { type IncomingMessage, type Server, type ServerResponse, createServer } from "node:http";
import type { AddressInfo } from "node:net";

export type Answering = (response: ServerResponse, data: Buffer, from: number, to: number, request: IncomingMessage) => void;

export interface Serving {
  readonly base: string;
  /** "name from-to" of each request. */
  readonly asked: string[];
  readonly server: Server;
  answering: Answering;
}

export const whole: Answering = (response, data, from, to) => {
  response.writeHead(206, { "Content-Length": to - from, "Content-Range": `bytes ${from}-${to - 1}/${data.length}` });
  response.end(data.subarray(from, to));
};

/** Serves the files of a folder. */
export async function serve(folder: string): Promise<Serving> {
  const asked: string[] = [];
  const server = createServer((request, response) => {
    const name = (request.url ?? "").slice(1);
    const [from = 0, last = 0] = (request.headers.range ?? "").replace("bytes=", "").split("-").map(Number);
    asked.push(`${name} ${from}-${last + 1}`);
    serving.answering(response, readFileSync(`${folder}/${name}`), from, last + 1, request);
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as AddressInfo;
  const serving: Serving = { base: `http://127.0.0.1:${port}/`, asked, server, answering: whole };
  return serving;
}
