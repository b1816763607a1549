/// The model of a tokenizer.json: words to tokens, by WordLevel, BPE or Unigram.
struct Vocabulary: Sendable {
  private enum Kind {
    case words
    case merges([Pair: Merge], ignored: Bool)
    case scores([Double], least: Double, longest: Int)
  }
  private struct Pair: Hashable {
    let left: Token
    let right: Token
  }
  private struct Merge {
    let rank: Int
    let made: Token
  }

  /// Token -> how it is written.
  let spelling: [Token: Chars]
  private let words: [ArraySlice<UInt32>: Token]
  private let kind: Kind
  private let unknownToken: Token?
  private let fusesUnknown: Bool
  private let bytes: [Token]?

  init(_ model: JSON) throws {
    let name = model["type"]?.text ?? ""
    var words: [ArraySlice<UInt32>: Token] = [:]
    var spelling: [Token: Chars] = [:]
    var unknownToken: Token?
    if name == "WordLevel" || name == "BPE" {
      for (word, id) in model["vocab"]?.entries ?? [] {
        guard let id = id.int else { throw unknown("a word without a token") }
        words[word[...]] = id
        spelling[id] = word
      }
      kind = try name == "BPE" ? Vocabulary.merges(model, words) : .words
      unknownToken = model["unk_token"]?.chars.flatMap { words[$0[...]] }
    } else if name == "Unigram" {
      var (scores, longest): ([Double], Int) = ([], 1)
      for entry in model["vocab"]?.list ?? [] {
        guard let pair = entry.list, pair.count == 2, let word = pair[0].chars, let score = pair[1].double else {
          throw unknown("a word without a score")
        }
        words[word[...]] = scores.count
        spelling[scores.count] = word
        scores.append(score)
        longest = max(longest, word.count)
      }
      kind = .scores(scores, least: min(0, scores.min() ?? 0), longest: longest)
      unknownToken = model["unk_id"]?.int
    } else {
      throw unknown("a model of the kind \(name)")
    }
    (self.words, self.spelling, self.unknownToken) = (words, spelling, unknownToken)
    fusesUnknown = model["fuse_unk"]?.flag ?? false
    let named = (0...255).map { words[ByteName.name(UInt8($0))[...]] }
    bytes = model["byte_fallback"]?.flag ?? false ? named.map { $0 ?? -1 } : nil
  }

  private static func merges(_ model: JSON, _ words: [ArraySlice<UInt32>: Token]) throws -> Kind {
    for key in ["continuing_subword_prefix", "end_of_word_suffix"] where !(model[key]?.chars ?? []).isEmpty {
      throw unknown(key)
    }
    var merges: [Pair: Merge] = [:]
    for (rank, merge) in (model["merges"]?.list ?? []).enumerated() {
      let parts: [ArraySlice<UInt32>]
      if let text = merge.chars {
        parts = text.split(separator: 0x20, maxSplits: 1, omittingEmptySubsequences: false)
      } else {
        parts = (merge.list ?? []).compactMap { $0.chars?[...] }
      }
      guard parts.count == 2, let left = words[parts[0]], let right = words[parts[1]], let made = words[parts[0] + parts[1]]
      else {
        throw EdgewrightError("tokenizer.json: a merge makes what is not in its vocabulary; copy the file again")
      }
      merges[Pair(left: left, right: right)] = Merge(rank: rank, made: made)
    }
    return .merges(merges, ignored: model["ignore_merges"]?.flag ?? false)
  }

  func add(_ word: Chars, to ids: inout [Token]) {
    switch kind {
    case .words:
      if let id = words[word[...]] ?? unknownToken { ids.append(id) }
    case .merges(let merges, let ignored):
      if ignored, let id = words[word[...]] {
        ids.append(id)
      } else {
        ids += Vocabulary.merge(symbols(word), merges)
      }
    case .scores(let scores, let least, let longest):
      for (piece, known) in likeliest(word, scores, least, longest) {
        if let id = words[piece] {
          ids.append(id)
        } else if let fallback = known ? nil : byteTokens(piece) {
          ids += fallback
        } else if let unknownToken {
          ids.append(unknownToken)
        }
      }
    }
  }

  /// The tokens of a text's bytes, where the vocabulary has all of them.
  private func byteTokens(_ text: ArraySlice<UInt32>) -> [Token]? {
    guard let bytes else { return nil }
    let found = utf8(text).map { bytes[Int($0)] }
    return found.contains(-1) ? nil : found
  }

  /// A word's characters as tokens, before anything is merged.
  private func symbols(_ word: Chars) -> [Token] {
    var (symbols, afterUnknown): ([Token], Bool) = ([], false)
    for i in word.indices {
      if let id = words[word[i...i]] {
        symbols.append(id)
      } else if let fallback = byteTokens(word[i...i]) {
        symbols += fallback
      } else if let unknownToken {
        if !(fusesUnknown && afterUnknown) { symbols.append(unknownToken) }
        afterUnknown = true
        continue
      }
      afterUnknown = false
    }
    return symbols
  }

  private struct Candidate: Comparable {
    let rank: Int
    let at: Int
    let right: Int
    let pair: Pair
    let made: Token

    static func == (a: Candidate, b: Candidate) -> Bool { a.rank == b.rank && a.at == b.at }
    static func < (a: Candidate, b: Candidate) -> Bool { (a.rank, a.at) < (b.rank, b.at) }
  }

  /// The pair of the lowest rank is merged, the leftmost of equals, until no pair is left.
  private static func merge(_ given: [Token], _ merges: [Pair: Merge]) -> [Token] {
    var symbols = given
    let none = symbols.count
    var before = symbols.indices.map { $0 - 1 }
    var after = symbols.indices.map { $0 + 1 }
    var gone = [Bool](repeating: false, count: none)
    var heap = Heap<Candidate>()
    func consider(_ at: Int) {
      guard at >= 0, at < none, after[at] < none else { return }
      let pair = Pair(left: symbols[at], right: symbols[after[at]])
      guard let merge = merges[pair] else { return }
      heap.push(Candidate(rank: merge.rank, at: at, right: after[at], pair: pair, made: merge.made))
    }
    for at in symbols.indices { consider(at) }
    while let best = heap.pop() {
      let stale =
        gone[best.at] || gone[best.right] || after[best.at] != best.right || symbols[best.at] != best.pair.left
        || symbols[best.right] != best.pair.right
      if stale { continue }
      symbols[best.at] = best.made
      gone[best.right] = true
      after[best.at] = after[best.right]
      if after[best.at] < none { before[after[best.at]] = best.at }
      consider(best.at)
      consider(before[best.at])
    }
    return symbols.indices.filter { !gone[$0] }.map { symbols[$0] }
  }

  /// The pieces whose scores add up to most (Viterbi). A character in no piece scores 10 below the least; those in a row are one.
  private func likeliest(
    _ word: Chars, _ scores: [Double], _ least: Double, _ longest: Int
  ) -> [(piece: ArraySlice<UInt32>, known: Bool)] {
    let size = word.count
    var best = [Double](repeating: -.infinity, count: size + 1)
    var from = [Int](repeating: 0, count: size + 1)
    var known = [Bool](repeating: false, count: size + 1)
    best[0] = 0
    for i in 0..<size {
      var single = false
      for end in i + 1...min(size, i + longest) {
        guard let id = words[word[i..<end]] else { continue }
        single = single || end == i + 1
        let score = best[i] + scores[id]
        if score > best[end] { (best[end], from[end], known[end]) = (score, i, true) }
      }
      let score = best[i] + least - 10
      if !single, score > best[i + 1] { (best[i + 1], from[i + 1], known[i + 1]) = (score, i, false) }
    }
    var (spans, end): ([(begin: Int, end: Int, known: Bool)], Int) = ([], size)
    while end > 0 {
      if !known[end], let last = spans.last, !last.known {
        spans[spans.count - 1].begin = from[end]
      } else {
        spans.append((from[end], end, known[end]))
      }
      end = from[end]
    }
    return spans.reversed().map { (word[$0.begin..<$0.end], $0.known) }
  }
}

/// A queue whose least comes first.
private struct Heap<Element: Comparable> {
  private var items: [Element] = []

  mutating func push(_ item: Element) {
    items.append(item)
    var at = items.count - 1
    while at > 0, items[at] < items[(at - 1) / 2] {
      items.swapAt(at, (at - 1) / 2)
      at = (at - 1) / 2
    }
  }

  mutating func pop() -> Element? {
    guard let least = items.first, let last = items.popLast() else { return nil }
    if items.isEmpty { return least }
    items[0] = last
    var at = 0
    while true {
      var least = at
      for child in [2 * at + 1, 2 * at + 2] where child < items.count && items[child] < items[least] { least = child }
      if least == at { break }
      items.swapAt(at, least)
      at = least
    }
    return least
  }
}
