import Foundation

public struct LoadOptions: Sendable {
  /// Damaged weights load without an error, so every file is hashed first.
  public var checksHashes = true
  /// Bytes of memory that are there; nil: as many as the machine has. On iOS give `os_proc_available_memory()`.
  public var availableMemory: Int?

  public init(checksHashes: Bool = true, availableMemory: Int? = nil) {
    (self.checksHashes, self.availableMemory) = (checksHashes, availableMemory)
  }
}

public struct GenerateOptions: Sendable {
  /// Default: the model's own.
  public var maxNewTokens: Int?
  /// Default: as the model's makers have it.
  public var sampling: Sampling?
  /// Strings that end the answer; they are not part of it.
  public var stops: [String] = []
  /// Through the chat template, where the model has one.
  public var chat = true
  /// Of a decoder-decoder.
  public var memory: Memory?
  /// Is told how the answer ended, when it did.
  public var onEnd: (@Sendable (Answer) -> Void)?

  public init() {}
}

/// The text of an answer, in pieces of whole characters.
public typealias TextStream = AsyncThrowingStream<String, any Error>

public struct Answer: Sendable {
  /// Why it ended: an end token, as many tokens as were asked for, no room left, a stop string.
  public enum Ending: String, Sendable {
    case end, limit, context, stop
  }

  public internal(set) var text = ""
  public internal(set) var tokens: [Token] = []
  public internal(set) var ending = Ending.end
  public internal(set) var promptTokens = 0
  /// Until the first token, and from then on.
  public internal(set) var firstSeconds = 0.0
  public internal(set) var seconds = 0.0
}

/// What is open of a model; used by one turn at a time.
final class Opened: @unchecked Sendable {
  let app: AppContract
  let tokenizer: Tokenizer?
  let runner: any GraphRunner

  init(_ app: AppContract, _ tokenizer: Tokenizer?, _ runner: any GraphRunner) {
    (self.app, self.tokenizer, self.runner) = (app, tokenizer, runner)
  }

  /// Tokens of one call.
  var chunk: Int { min(app.prefillChunk, runner.mostTokens) }
}

/// A model in memory. It answers one prompt at a time: a second call meanwhile throws, one after a cancelled call waits for it.
public final class Model: Sendable {
  public let app: AppContract
  /// The runtime and its version.
  public let runtime: String
  private let opened: Opened
  private let turns = Turns()
  private let queue = DispatchQueue(label: "edgewright.model", qos: .userInitiated)

  private init(_ opened: Opened) {
    (self.opened, app, runtime) = (opened, opened.app, opened.runner.name)
  }

  /// Opens the folder that app.json lies in: checks its files, then loads them. It leaves the calling thread free.
  public static func open(
    _ folder: URL, runtime: some Runtime, options: LoadOptions = LoadOptions(), progress: @escaping LoadProgress = { _ in }
  ) async throws -> Model {
    try await withCheckedThrowingContinuation { (done: CheckedContinuation<Model, any Error>) in
      DispatchQueue.global(qos: .userInitiated).async {
        done.resume(with: Result { try load(folder, runtime, options, progress) })
      }
    }
  }

  private static func load(
    _ folder: URL, _ runtime: some Runtime, _ options: LoadOptions, _ progress: @escaping LoadProgress
  ) throws -> Model {
    let app = try AppContract.read(folder)
    let there = options.availableMemory ?? Int(clamping: ProcessInfo.processInfo.physicalMemory)
    guard app.memory.total <= there else {
      throw EdgewrightError(
        "the model takes about \(gibibytes(app.memory.total)) GiB of memory, and \(gibibytes(there)) are there; close other apps, "
          + "give the app the entitlement increased-memory-limit, or export with fewer --bits")
    }
    var files = try runtime.files(app)
    if let name = app.tokenizer?.file {
      guard let fact = app.files[name] else { throw EdgewrightError("app.json has no file \(name); embed the bundle again") }
      files[name] = fact
    }
    try Files.check(files, in: folder, hashes: options.checksHashes, progress: progress)
    let tokenizer = try app.tokenizer.map { try Tokenizer(folder.appendingPathComponent($0.file)) }
    return Model(Opened(app, tokenizer, try runtime.open(app, in: folder, progress: progress)))
  }

  /// The text that follows a prompt, in pieces of whole characters. The answer ends where its task is cancelled.
  public func generate(_ prompt: String, _ options: GenerateOptions = GenerateOptions()) -> TextStream {
    generate({ try self.tokens(ofPrompt: prompt, chat: options.chat) }, options)
  }

  /// The same of token ids.
  public func generate(_ prompt: [Token], _ options: GenerateOptions = GenerateOptions()) -> TextStream {
    generate({ prompt }, options)
  }

  private func generate(
    _ prompt: @escaping @Sendable () throws -> [Token], _ options: GenerateOptions
  ) -> TextStream {
    AsyncThrowingStream { continuation in
      let turn: Turn
      do {
        turn = try turns.take()
      } catch {
        continuation.finish(throwing: error)
        return
      }
      continuation.onTermination = { _ in turn.cancel() }
      queue.async { [opened] in
        do {
          let answer = try Loop(opened, turn, options).run(try prompt()) { continuation.yield($0) }
          turn.end()
          options.onEnd?(answer)
          continuation.finish()
        } catch {
          turn.end()
          continuation.finish(throwing: error)
        }
      }
    }
  }

  /// A whole answer. Throws CancellationError where the task is cancelled.
  public func answer(_ prompt: String, _ options: GenerateOptions = GenerateOptions()) async throws -> Answer {
    try await inTurn { [opened] turn in
      try Loop(opened, turn, options).run(try self.tokens(ofPrompt: prompt, chat: options.chat)) { _ in }
    }
  }

  public func answer(_ prompt: [Token], _ options: GenerateOptions = GenerateOptions()) async throws -> Answer {
    try await inTurn { [opened] turn in try Loop(opened, turn, options).run(prompt) { _ in } }
  }

  /// The memory of a context, for a decoder-decoder.
  public func readContext(_ context: String) async throws -> Memory {
    try await readContext(try tokens(of: context))
  }

  public func readContext(_ context: [Token]) async throws -> Memory {
    try await inTurn { [opened] turn in try ContextReader(opened, turn).read(context) }
  }

  /// A turn of your own: `body` gets a stream, off the calling thread.
  public func withStream<Result: Sendable>(
    _ prompt: [Token], newTokens: Int, memory: Memory? = nil, _ body: @escaping @Sendable (TokenStream) throws -> Result
  ) async throws -> Result {
    try await inTurn { [opened] turn in
      try body(try TokenStream(opened, turn, prompt: prompt, newTokens: newTokens, memory: memory))
    }
  }

  private func inTurn<Result: Sendable>(_ body: @escaping @Sendable (Turn) throws -> Result) async throws -> Result {
    let turn = try turns.take()
    return try await withTaskCancellationHandler {
      try await withCheckedThrowingContinuation { (done: CheckedContinuation<Result, any Error>) in
        queue.async {
          let result = Swift.Result {
            try turn.check()
            return try body(turn)
          }
          turn.end()
          done.resume(with: result)
        }
      }
    } onCancel: {
      turn.cancel()
    }
  }

  /// The tokens of a text alone.
  public func tokens(of text: String) throws -> [Token] {
    try tokenizer().encode(text)
  }

  public func text(of tokens: [Token]) throws -> String {
    try tokenizer().decode(tokens)
  }

  /// The tokens of a prompt, with what stands around it.
  public func tokens(ofPrompt prompt: String, chat: Bool = true) throws -> [Token] {
    let text = chars(prompt)
    if text.allSatisfy(isSpace) { throw EdgewrightError("the prompt is empty; give some text") }
    let facts = app.tokenizer
    var ids: [Token]
    if chat, let template = app.chat {
      guard let before = template.before, let after = template.after else {
        throw EdgewrightError("the chat template takes no lone question; render app.json's chat.template, or pass chat = false")
      }
      var words = text[...]
      while template.trims, let c = words.first, isSpace(c) { words = words.dropFirst() }
      while template.trims, let c = words.last, isSpace(c) { words = words.dropLast() }
      ids = try tokens(of: before + string(words) + after)
    } else {
      ids = try (facts?.before ?? []) + tokens(of: prompt) + (facts?.after ?? [])
    }
    if let bos = facts?.bos, ids.count > 1, ids[0] == bos, ids[1] == bos { ids.removeFirst() }
    return ids
  }

  private func tokenizer() throws -> Tokenizer {
    guard let tokenizer = opened.tokenizer else { throw EdgewrightError("\(app.name) has no tokenizer: give it token ids") }
    return tokenizer
  }
}

private func gibibytes(_ bytes: Int) -> String {
  String(format: "%.2f", Double(bytes) / Double(1 << 30))
}
