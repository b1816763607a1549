/// The text of tokens as they come, up to a stop string. Half a character, and what may become a stop string, is held back.
struct Writer {
  private let tokenizer: Tokenizer?
  private let stops: [Chars]
  private var ids: [Token] = []
  private var from = 0
  private var shown = 0
  private var held = Chars()
  private(set) var stopped = false

  init(_ tokenizer: Tokenizer?, stops: [String]) throws {
    guard stops.allSatisfy({ !$0.isEmpty }) else {
      throw EdgewrightError("an empty stop string would stop before the first letter; give some text")
    }
    self.tokenizer = tokenizer
    self.stops = stops.map { chars($0) }
  }

  /// What can be shown now.
  mutating func put(_ token: Token) -> String {
    ids.append(token)
    guard let tokenizer else { return "" }
    let known = tokenizer.decodeChars(ids[from..<shown]).count
    let now = tokenizer.decodeChars(ids[from...])
    if now.count <= known || now.last == replacement { return "" }
    from = shown
    shown = ids.count
    return show(now[known...], last: false)
  }

  /// What is left when nothing follows.
  mutating func end() -> String {
    guard let tokenizer, !stopped else { return "" }
    let known = tokenizer.decodeChars(ids[from..<shown]).count
    return show(tokenizer.decodeChars(ids[from...]).dropFirst(known), last: true)
  }

  private mutating func show(_ piece: ArraySlice<UInt32>, last: Bool) -> String {
    held += piece
    var (cut, kept): (Int?, Int) = (nil, 0)
    for stop in stops {
      if let at = find(stop, in: held), at < cut ?? Int.max { cut = at }
      for n in 1..<stop.count where !last && n > kept && n <= held.count && held.suffix(n) == stop.prefix(n) { kept = n }
    }
    stopped = cut != nil
    let size = cut ?? held.count - kept
    let out = string(held.prefix(size))
    held.removeFirst(size)
    return out
  }
}
