/// One answer under way, token by token: for loops of your own. A model has one at a time.
public final class TokenStream {
  /// Positions that there are.
  public private(set) var capacity = 0
  /// Positions read.
  public private(set) var past = 0
  /// Tokens that the decoder has read.
  public private(set) var read: [Token] = []

  private let opened: Opened
  private let turn: Turn
  private let graph: Graph
  private let logits: Tensor
  private let pastLength: Tensor
  private let position: Tensor
  private var pending: [Token] = []
  private var slots: [Token] = []  // which row of the memory stands at each position, or -1
  private var held: [String: Tensor] = [:]
  private var given: [String: Tensor] = [:]
  private var calls: (any GraphCalls)?

  init(_ opened: Opened, _ turn: Turn, prompt: [Token], newTokens: Int, memory: Memory?) throws {
    let app = opened.app
    (self.opened, self.turn) = (opened, turn)
    graph = try app.graph("decoder")
    logits = try Tensor(zeros: .float32, [1, 1, app.vocab])
    pastLength = try Tensor.ints([0], [1])
    position = try Tensor.ints([0], [1])
    try TokenStream.require(prompt, vocab: app.vocab, whose: "the prompt")
    guard newTokens > 0 else { throw EdgewrightError("0 new tokens were asked for; ask for 1 or more") }
    if memory != nil, app.context == nil {
      throw EdgewrightError("this model keeps no memory of a context; give all of it as the prompt")
    }
    if app.task == "seq2seq" {
      try encode(prompt, newTokens)
    } else {
      if let context = app.context { try splice(context, prompt, memory) } else { pending = prompt }
      guard pending.count < app.maxContext else {
        throw EdgewrightError(
          "the prompt has \(pending.count) tokens, the model's context is \(app.maxContext); shorten it")
      }
      capacity = min(app.maxContext, pending.count + newTokens)
    }
    calls = try opened.runner.calls(graph, capacity: capacity, held: held)
  }

  static func require(_ ids: [Token], vocab: Int, whose: String) throws {
    if ids.isEmpty { throw EdgewrightError("\(whose) has no tokens; give some text") }
    if let id = ids.first(where: { $0 < 0 || $0 >= vocab }) {
      throw EdgewrightError(
        "\(whose) has the token \(id), the model has \(vocab); is the tokenizer another model's?")
    }
  }

  /// Reads the prompt; the logits [vocab] of what comes next. They are valid until the next call.
  public func prefill() throws -> UnsafeBufferPointer<Float> {
    guard past == 0 else { throw EdgewrightError("the prompt has been read already; feed tokens") }
    return try feed(pending)
  }

  /// Appends a token; the logits of what comes next.
  public func feed(_ token: Token) throws -> UnsafeBufferPointer<Float> {
    guard past > 0 else { throw EdgewrightError("the prompt has not been read yet; call prefill first") }
    try TokenStream.require([token], vocab: opened.app.vocab, whose: "the stream")
    return try feed([token])
  }

  /// Appends tokens, in calls of at most the chunk of app.json; the logits of the last one.
  private func feed(_ tokens: [Token]) throws -> UnsafeBufferPointer<Float> {
    guard past + tokens.count <= capacity else {
      throw EdgewrightError(
        "\(past + tokens.count) tokens do not fit the context of \(capacity); ask for fewer new tokens, or shorten the prompt")
    }
    for at in stride(from: 0, to: tokens.count, by: opened.chunk) {
      try turn.check()
      try step(tokens[at..<min(tokens.count, at + opened.chunk)])
    }
    return UnsafeBufferPointer(logits.values(Float.self))
  }

  private func step(_ tokens: ArraySlice<Token>) throws {
    let size = tokens.count
    if given["input_ids"]?.shape != [1, size] {
      given = ["input_ids": try Tensor(zeros: .int64, [1, size]), "past_length": pastLength, "logit_positions": position]
      if graph.reads("slots") { given["slots"] = try Tensor(zeros: .int64, [size]) }
    }
    given["input_ids"]?.fill(Array(tokens))
    pastLength.fill([past])
    position.fill([size - 1])
    given["slots"]?.fill((past..<past + size).map { $0 < slots.count ? slots[$0] : -1 })
    try calls?.run(given, into: ["logits": logits])
    past += size
    read += tokens
  }

  /// The encoder reads the prompt; the decoder begins with what app.json says.
  private func encode(_ prompt: [Token], _ newTokens: Int) throws {
    let app = opened.app
    guard prompt.count <= app.maxContext else {
      throw EdgewrightError(
        "the prompt has \(prompt.count) tokens, the model reads at most \(app.maxContext); shorten it")
    }
    guard let start = app.decoderStart else {
      throw EdgewrightError("app.json has no decoder_start; embed the bundle again")
    }
    capacity = min(app.maxContext, newTokens + 1 + app.forced.count)
    let mask = try Tensor(zeros: .bool, [1, prompt.count])
    mask.values(Bool.self).update(repeating: true)
    let ids = try Tensor.ints(prompt, [1, prompt.count])
    let encoded = try opened.runner.run(try app.graph("encoder"), ["input_ids": ids, "encoder_mask": mask])
    held = try opened.runner.run(try app.graph("cross_kv"), encoded)
    held["encoder_mask"] = mask
    pending = [start] + app.forced
  }

  /// The prompt behind the rows of a memory: a token 0 stands for each of them.
  private func splice(_ context: ContextFacts, _ prompt: [Token], _ memory: Memory?) throws {
    let rows = memory?.rows ?? 0
    guard rows <= context.rows else {
      throw EdgewrightError("the context gives \(rows) rows of memory, the model takes \(context.rows); give a shorter one")
    }
    if let memory, memory.fingerprint != opened.app.fingerprint || memory.values.count != rows * context.hidden {
      throw EdgewrightError("the memory was made by another model, or by other weights of this one; read the context again")
    }
    let early = context.splice == "released" && rows > 0 ? 1 : 0
    let lead = Array(context.prefix.dropLast(early))
    pending = lead + [Token](repeating: 0, count: rows + early) + prompt
    slots = lead.map { _ in -1 } + Array(0..<rows)
    let tensor = try Tensor(zeros: .float32, [1, max(1, rows), context.hidden])
    if let memory { _ = tensor.values(Float.self).update(from: memory.values) }
    held["memory"] = tensor
  }
}

/// Reads contexts: a decoder-decoder's memory, part by part.
struct ContextReader {
  let opened: Opened
  let turn: Turn
  let context: ContextFacts
  let graph: Graph

  init(_ opened: Opened, _ turn: Turn) throws {
    guard let context = opened.app.context else {
      throw EdgewrightError("this model reads no context; give all of it as the prompt")
    }
    (self.opened, self.turn, self.context) = (opened, turn, context)
    graph = try opened.app.graph("context")
  }

  func read(_ ids: [Token]) throws -> Memory {
    try TokenStream.require(ids, vocab: context.vocab, whose: "the context")
    var values: [Float] = []
    for at in stride(from: 0, to: ids.count, by: context.window) {
      try turn.check()
      values += try part(Array(ids[at..<min(ids.count, at + context.window)]))
    }
    return Memory(rows: values.count / context.hidden, values: values, fingerprint: opened.app.fingerprint)
  }

  private func part(_ part: [Token]) throws -> [Float] {
    if context.tokens.isEmpty {
      let made = try opened.runner.run(graph, ["input_ids": try Tensor.ints(part, [1, part.count])])
      guard let memory = made["memory"] else { throw EdgewrightError("the context gives no memory; embed the bundle again") }
      return memory.floats()
    }
    let ids = part + context.tokens
    let calls = try opened.runner.calls(graph, capacity: ids.count, held: [:])
    var values: [Float] = []
    for at in stride(from: 0, to: ids.count, by: opened.chunk) {
      try turn.check()
      let tokens = ids[at..<min(ids.count, at + opened.chunk)]
      let kept = tokens.indices.filter { $0 >= part.count }.map { $0 - at }
      let wanted = kept.isEmpty ? [tokens.count - 1] : kept
      let memory = try Tensor(zeros: .float32, [1, wanted.count, context.hidden])
      let given = [
        "input_ids": try Tensor.ints(Array(tokens), [1, tokens.count]),
        "past_length": try Tensor.ints([at], [1]),
        "logit_positions": try Tensor.ints(wanted, [wanted.count]),
      ]
      try calls.run(given.filter { graph.reads($0.key) }, into: ["memory": memory])
      if !kept.isEmpty { values += memory.values(Float.self) }
    }
    return values
  }
}
