import Edgewright
import EdgewrightCoreML
import EdgewrightONNX
import Foundation

/// The command line: answers a prompt, checks the golden traces, measures.
@main
struct Client {
  static func main() async {
    do {
      let arguments = try Arguments(Array(CommandLine.arguments.dropFirst()))
      exit(try await run(arguments))
    } catch {
      FileHandle.standardError.write(Data("error: \(error)\n".utf8))
      exit(2)
    }
  }

  private static func run(_ arguments: Arguments) async throws -> Int32 {
    let asked = arguments.has("--prompt") || arguments.has("--ids")
    if arguments.has("--help") || !(asked || arguments.has("--trace") || arguments.has("--bench")) {
      say("\(Arguments.usage)\n")
      return arguments.has("--help") ? 0 : 2
    }
    let model = try await open(arguments)
    if let file = arguments.file("--trace") {
      let report = try await model.check(try Traces(contentsOf: file))
      for line in report.failures { note(line) }
      say(
        "\(report.casesRight) of \(report.cases) traces, \(report.textsRight) of \(report.texts) texts; "
          + "logits differ by at most \(report.largestDifference)\n")
      if !report.passed { return 1 }
    }
    if asked { try await answer(model, arguments) }
    if arguments.has("--bench") { try await bench(model, arguments) }
    return 0
  }

  private static func open(_ arguments: Arguments) async throws -> Model {
    let folder = arguments.file("--model") ?? URL(fileURLWithPath: "model")
    let options = LoadOptions(
      checksHashes: !arguments.has("--no-check"), availableMemory: try arguments.count("--available-memory"))
    switch arguments["--runtime"] ?? "onnx" {
    case "onnx":
      return try await Model.open(folder, runtime: OnnxRuntime(threads: try arguments.count("--threads") ?? 0), options: options)
    case "coreml":
      #if canImport(CoreML)
        guard #available(macOS 15, iOS 18, *) else { throw EdgewrightError("Core ML keeps states from macOS 15 and iOS 18 on") }
        return try await Model.open(folder, runtime: CoreMLRuntime(), options: options) { stage in
          if stage == .compiling { note("Core ML compiles the model; it does so once") }
        }
      #else
        throw EdgewrightError("there is no Core ML here; leave --runtime out")
      #endif
    case let other:
      throw EdgewrightError("--runtime \(other) is none of onnx, coreml")
    }
  }

  private static func answer(_ model: Model, _ arguments: Arguments) async throws {
    var options = GenerateOptions()
    options.stops = arguments.stops
    options.chat = !arguments.has("--no-chat")
    options.maxNewTokens = try arguments.count("--max-new-tokens")
    options.sampling = try arguments.sampling(model.app.sampling)
    if let file = arguments.file("--memory") {
      options.memory = try Memory(contentsOf: file)
    } else if let file = arguments.file("--context") {
      guard let context = try? String(contentsOf: file, encoding: .utf8) else {
        throw EdgewrightError("\(file.path) cannot be read as text")
      }
      let memory = try await model.readContext(context)
      options.memory = memory
      if let file = arguments.file("--save-memory") { try memory.save(to: file) }
    }
    if let ids = try arguments.ids() {
      let said = try await model.answer(ids, options)
      say("\(said.tokens.map(String.init).joined(separator: ","))\n")
      return summarize(said)
    }
    let (ended, end) = AsyncStream<Answer>.makeStream()
    options.onEnd = { end.yield($0) }
    let prompt = arguments["--prompt"] ?? ""
    let text = prompt == "-" ? String(decoding: FileHandle.standardInput.readDataToEndOfFile(), as: UTF8.self) : prompt
    for try await piece in model.generate(text, options) {
      say(piece)
    }
    say("\n")
    end.finish()
    for await said in ended { summarize(said) }
  }

  private static func summarize(_ said: Answer) {
    note(
      "\(said.promptTokens) tokens read in \(said.firstSeconds) s, \(said.tokens.count) written in \(said.seconds) s; "
        + "ended by: \(said.ending.rawValue)")
  }

  /// pp: tokens of a prompt read a second. tg: tokens generated a second, behind a prompt of one token.
  private static func bench(_ model: Model, _ arguments: Arguments) async throws {
    let most = model.app.maxContext - 1
    let repeats = max(1, try arguments.count("--repeats") ?? 5)
    let pp = min(max(1, try arguments.count("--pp") ?? 512), most)
    let tg = min(max(1, try arguments.count("--tg") ?? 128), most - 1)
    let token = model.app.vocab / 2
    say("| \(model.app.name), \(model.runtime) | tokens/s |\n|---|---|\n")
    try await row("pp\(pp)", pp, repeats) {
      let began = Date()
      return try await model.withStream([Token](repeating: token, count: pp), newTokens: 1) { stream in
        _ = try stream.prefill()
        return Date().timeIntervalSince(began)
      }
    }
    try await row("tg\(tg)", tg, repeats) {
      try await model.withStream([token], newTokens: tg + 1) { stream in
        _ = try stream.prefill()
        let began = Date()
        for _ in 0..<tg { _ = try stream.feed(token) }
        return Date().timeIntervalSince(began)
      }
    }
  }

  private static func row(_ test: String, _ tokens: Int, _ repeats: Int, _ seconds: () async throws -> Double) async throws {
    _ = try await seconds()  // the first run does not count
    var rates: [Double] = []
    for _ in 0..<repeats { rates.append(Double(tokens) / (try await seconds())) }
    let mean = rates.reduce(0, +) / Double(rates.count)
    let spread = (rates.map { ($0 - mean) * ($0 - mean) }.reduce(0, +) / Double(rates.count)).squareRoot()
    say("| \(test) | \(rounded(mean)) ± \(rounded(spread)) |\n")
  }

  private static func rounded(_ rate: Double) -> String { String(format: "%.1f", rate) }

  /// To standard output at once, in order with what is written piece by piece.
  private static func say(_ text: String) {
    FileHandle.standardOutput.write(Data(text.utf8))
  }

  private static func note(_ line: String) {
    FileHandle.standardError.write(Data("\(line)\n".utf8))
  }
}
