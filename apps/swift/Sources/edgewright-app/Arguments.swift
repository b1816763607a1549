import Edgewright
import Foundation

/// The words of the command line.
struct Arguments {
  static let usage = """
    edgewright-app [--model DIR] WHAT
      --prompt TEXT             answer it; '-' reads standard input
      --ids 5,6,7               answer token ids, and print token ids
      --context FILE            text that a decoder-decoder reads first; --save-memory FILE keeps what it made of it
      --memory FILE             a memory that was kept
      --trace FILE              check the golden traces (traces.json)
      --bench [--pp N] [--tg N] [--repeats N]   tokens a second: reading N tokens, generating N tokens
      --runtime onnx|coreml     what runs the model (onnx)
      --max-new-tokens N  --temperature T  --top-k N  --top-p P  --seed N  --stop TEXT  --no-chat  --no-check  --threads N
      --available-memory BYTES  refuse a model that takes more
    """

  private static let flags = ["--bench", "--no-chat", "--no-check", "--help"]
  private static let options = [
    "--model", "--prompt", "--ids", "--context", "--memory", "--save-memory", "--trace", "--pp", "--tg", "--repeats",
    "--max-new-tokens", "--temperature", "--top-k", "--top-p", "--seed", "--stop", "--threads", "--runtime",
    "--available-memory",
  ]

  private var given: [String: String] = [:]
  private(set) var stops: [String] = []

  init(_ words: [String]) throws {
    var at = 0
    while at < words.count {
      let word = words[at]
      if Arguments.flags.contains(word) {
        given[word] = ""
      } else if Arguments.options.contains(word) {
        at += 1
        guard at < words.count else { throw EdgewrightError("\(word) needs a value (see --help)") }
        if word == "--stop" { stops.append(words[at]) }
        given[word] = words[at]
      } else {
        throw EdgewrightError("there is no option \(word) (see --help)")
      }
      at += 1
    }
  }

  func has(_ name: String) -> Bool { given[name] != nil }

  subscript(_ name: String) -> String? { given[name] }

  func file(_ name: String) -> URL? { given[name].map { URL(fileURLWithPath: $0) } }

  func number(_ name: String) throws -> Double? {
    guard let word = given[name] else { return nil }
    guard let value = Double(word), value >= 0, value < 1e15 else {
      throw EdgewrightError("\(name) \(word) is no number from 0")
    }
    return value
  }

  func count(_ name: String) throws -> Int? { try number(name).map { Int($0) } }

  func ids() throws -> [Token]? {
    guard let text = given["--ids"] else { return nil }
    let ids = text.split(separator: ",", omittingEmptySubsequences: false).map { UInt32($0) }
    guard !ids.contains(nil) else { throw EdgewrightError("--ids \(text) are no token ids; write 5,6,7") }
    return ids.compactMap { $0.map { Int($0) } }
  }

  func sampling(_ own: Sampling) throws -> Sampling {
    var sampling = own
    sampling.temperature = try number("--temperature") ?? own.temperature
    sampling.topK = try count("--top-k") ?? own.topK
    sampling.topP = try number("--top-p") ?? own.topP
    sampling.seed = UInt64(try count("--seed") ?? 0)
    return sampling
  }
}
