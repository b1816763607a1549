import Foundation

/// The turns of a model: one at a time. One that is cancelled makes room for the next, which waits in the model's queue.
final class Turns: @unchecked Sendable {
  private let lock = NSLock()
  private var current: Turn?

  func take() throws -> Turn {
    try lock.withLock {
      if let current, !current.isCancelled {
        throw EdgewrightError(
          "the model is answering already; wait for that answer, cancel it, or open a second model")
      }
      let turn = Turn(self)
      current = turn
      return turn
    }
  }

  fileprivate func end(_ turn: Turn) {
    lock.withLock {
      if current === turn { current = nil }
    }
  }
}

final class Turn: @unchecked Sendable {
  private let lock = NSLock()
  private let turns: Turns
  private var cancelled = false

  fileprivate init(_ turns: Turns) {
    self.turns = turns
  }

  var isCancelled: Bool { lock.withLock { cancelled } }

  func cancel() {
    lock.withLock { cancelled = true }
  }

  func end() {
    turns.end(self)
  }

  /// Throws where the turn is cancelled: asked before every call of a graph.
  func check() throws {
    if isCancelled { throw CancellationError() }
  }
}

/// The loop: prefill, then one decode step a token.
struct Loop {
  private let opened: Opened
  private let turn: Turn
  private let options: GenerateOptions

  init(_ opened: Opened, _ turn: Turn, _ options: GenerateOptions) {
    (self.opened, self.turn, self.options) = (opened, turn, options)
  }

  /// tell: is given each piece of text when it is whole characters.
  func run(_ prompt: [Token], _ tell: (String) -> Void) throws -> Answer {
    let app = opened.app
    let most = min(options.maxNewTokens ?? app.maxNewTokens, app.maxContext - 1)
    var sampler = try Sampler(options.sampling ?? app.sampling)
    var writer = try Writer(opened.tokenizer, stops: app.stops.strings + options.stops)
    let ends = Set(app.stops.tokens)
    var clock = Date()
    var answer = Answer()
    answer.promptTokens = prompt.count
    func show(_ piece: String) {
      if piece.isEmpty { return }
      answer.text.unicodeScalars.append(contentsOf: piece.unicodeScalars)
      tell(piece)
    }
    let stream = try TokenStream(opened, turn, prompt: prompt, newTokens: most, memory: options.memory)
    var logits = try stream.prefill()
    while true {
      let token = sampler.pick(logits, seen: stream.read)
      if answer.tokens.isEmpty {
        answer.firstSeconds = Date().timeIntervalSince(clock)
        clock = Date()
      }
      if ends.contains(token) { break }
      answer.tokens.append(token)
      show(writer.put(token))
      answer.ending = writer.stopped ? .stop : answer.tokens.count == most ? .limit : .context
      if writer.stopped || answer.tokens.count == most || stream.past >= stream.capacity { break }
      answer.ending = .end
      logits = try stream.feed(token)
    }
    show(writer.end())
    if writer.stopped { answer.ending = .stop }
    answer.seconds = Date().timeIntervalSince(clock)
    return answer
  }
}
