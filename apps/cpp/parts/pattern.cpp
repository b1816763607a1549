// ---- regular expressions, as far as pre-tokenizers use them --------------------------------------------------------
// Alternatives, groups (?:…) and (?i:…), look-aheads (?=…) and (?!…), classes with \s \S \d \w \p{L} \p{N} \p{M} \p{P}, and
// greedy ? * + {m,n}, also possessive. Matching goes back as a backtracking engine does: the first alternative that fits.

class Pattern {
 public:
  static const Pattern& gpt2() {
    static const Pattern pattern(R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)");
    return pattern;
  }

  static const Pattern& known(const std::string& text) {
    static std::mutex lock;
    static std::map<std::string, Pattern> patterns;
    const std::lock_guard<std::mutex> guard(lock);
    return patterns.try_emplace(text, text).first->second;
  }

  explicit Pattern(const std::string& text) : text_(chars_of(text)) {
    root_ = alternatives(false);
    if (at_ != text_.size()) refuse();
  }

  // The matches from left to right, and what is between them.
  std::vector<Span> spans(const Chars& text) const {
    std::vector<Span> spans;
    std::size_t from = 0;
    for (std::size_t at = 0; at < text.size();) {
      std::size_t end = at;
      const bool found = match(*root_, text, at, [&end](std::size_t to) {
        end = to;
        return true;
      });
      if (!found || end == at) {
        ++at;
        continue;
      }
      spans.push_back({from, at, false});
      spans.push_back({at, end, true});
      from = at = end;
    }
    spans.push_back({from, text.size(), false});
    return spans;
  }

 private:
  enum class Kind { one_of, sequence, choice, repeat, ahead };
  struct Item {  // of a class: a range, or a category
    char32_t first, last;
    char category = 0;
    bool negated = false;
  };
  struct Node {
    Kind kind = Kind::sequence;
    std::vector<Item> items{};
    bool negated = false, fold = false, possessive = false;
    std::size_t least = 1, most = 1;
    std::vector<std::unique_ptr<Node>> parts{};
  };
  using Made = std::unique_ptr<Node>;
  using Then = std::function<bool(std::size_t)>;

  [[noreturn]] void refuse() const {
    fail("tokenizer.json: this client does not know the regular expression " + utf8_of(text_) + "; embed the bundle again");
  }

  bool take(std::string_view wanted) {
    const Chars chars = chars_of(wanted);
    if (text_.compare(at_, chars.size(), chars) != 0) return false;
    at_ += chars.size();
    return true;
  }

  static Made make(Kind kind) {
    Made node = std::make_unique<Node>();
    node->kind = kind;
    return node;
  }

  Made alternatives(bool fold) {
    Made choice = make(Kind::choice);
    do {
      Made sequence = make(Kind::sequence);
      while (at_ < text_.size() && text_[at_] != U'|' && text_[at_] != U')') sequence->parts.push_back(repeated(fold));
      choice->parts.push_back(std::move(sequence));
    } while (take("|"));
    return choice;
  }

  Made repeated(bool fold) {
    Made inner = atom(fold);
    std::size_t least = 1, most = 1;
    const std::size_t endless = std::numeric_limits<std::size_t>::max();
    if (take("?")) {
      least = 0;
    } else if (take("*")) {
      least = 0;
      most = endless;
    } else if (take("+")) {
      most = endless;
    } else if (take("{")) {
      least = number();
      most = least;
      if (take(",")) most = at_ < text_.size() && text_[at_] != U'}' ? number() : endless;
      if (!take("}")) refuse();
    } else {
      return inner;
    }
    Made node = make(Kind::repeat);
    node->least = least;
    node->most = most;
    node->possessive = take("+");
    if (take("?")) refuse();  // lazy
    node->parts.push_back(std::move(inner));
    return node;
  }

  std::size_t number() {
    std::size_t value = 0;
    if (at_ >= text_.size() || text_[at_] < U'0' || text_[at_] > U'9') refuse();
    while (at_ < text_.size() && text_[at_] >= U'0' && text_[at_] <= U'9' && value < 1000) value = 10 * value + (text_[at_++] - U'0');
    return value;
  }

  Made atom(bool fold) {
    if (take("(?!") || take("(?=")) {
      Made node = make(Kind::ahead);
      node->negated = text_[at_ - 1] == U'!';
      node->parts.push_back(alternatives(fold));
      if (!take(")")) refuse();
      return node;
    }
    const bool insensitive = take("(?i:");
    if (insensitive || take("(?:") || take("(")) {
      if (at_ < text_.size() && text_[at_] == U'?') refuse();
      Made node = alternatives(fold || insensitive);
      if (!take(")")) refuse();
      return node;
    }
    Made node = make(Kind::one_of);
    node->fold = fold;
    if (take("[")) {
      node->negated = take("^");
      while (at_ < text_.size() && text_[at_] != U']') {
        Item item = member();
        if (item.category == 0 && at_ + 1 < text_.size() && text_[at_] == U'-' && text_[at_ + 1] != U']') {
          ++at_;
          item.last = member().first;
        }
        node->items.push_back(item);
      }
      if (!take("]")) refuse();
      return node;
    }
    if (at_ < text_.size() && (text_[at_] == U'^' || text_[at_] == U'$' || text_[at_] == U'.')) refuse();
    node->items.push_back(member());
    return node;
  }

  Item member() {
    if (at_ >= text_.size()) refuse();
    if (!take("\\")) {
      const char32_t c = text_[at_++];
      return {c, c};
    }
    if (at_ >= text_.size()) refuse();
    const char32_t c = text_[at_++];
    if (c == U'r') return {U'\r', U'\r'};
    if (c == U'n') return {U'\n', U'\n'};
    if (c == U't') return {U'\t', U'\t'};
    if (c == U's' || c == U'S') return {0, 0, 's', c == U'S'};
    if (c == U'd' || c == U'D') return {0, 0, 'd', c == U'D'};
    if (c == U'w' || c == U'W') return {0, 0, 'w', c == U'W'};
    if (c == U'p' || c == U'P') {
      if (!take("{")) refuse();
      for (const char category : {'L', 'N', 'M', 'P'})
        if (take(std::string(1, category) + "}")) return {0, 0, category, c == U'P'};
      refuse();
    }
    if (is_letter(c) || is_number(c)) refuse();
    return {c, c};
  }

  static bool in_category(char32_t c, char category) {
    switch (category) {
      case 's': return is_space(c);
      case 'd': return in_ranges(kDigits, c);
      case 'w': return is_word(c);
      case 'L': return is_letter(c);
      case 'N': return is_number(c);
      case 'M': return is_mark(c);
      default: return in_ranges(kPunctuation, c);
    }
  }

  static bool fits(const Node& node, char32_t c) {
    const auto plain = [&node](char32_t one) {
      return std::any_of(node.items.begin(), node.items.end(), [one](const Item& item) {
        if (item.category != 0) return in_category(one, item.category) != item.negated;
        return one >= item.first && one <= item.last;
      });
    };
    bool found = plain(c);
    if (!found && node.fold) {
      if (c >= U'a' && c <= U'z') found = plain(c - 32);
      if (c >= U'A' && c <= U'Z') found = plain(c + 32);
      if (c == 0x17F) found = plain(U's') || plain(U'S');
      if (c == 0x212A) found = plain(U'k') || plain(U'K');
    }
    return found != node.negated;
  }

  static bool match(const Node& node, const Chars& text, std::size_t at, const Then& then) {
    switch (node.kind) {
      case Kind::one_of: return at < text.size() && fits(node, text[at]) && then(at + 1);
      case Kind::sequence: return in_turn(node, 0, text, at, then);
      case Kind::choice:
        return std::any_of(node.parts.begin(), node.parts.end(), [&](const Made& part) { return match(*part, text, at, then); });
      case Kind::ahead: {
        const bool found = match(*node.parts[0], text, at, [](std::size_t) { return true; });
        return found != node.negated && then(at);
      }
      default: return again(node, text, at, then);
    }
  }

  static bool in_turn(const Node& node, std::size_t i, const Chars& text, std::size_t at, const Then& then) {
    if (i == node.parts.size()) return then(at);
    return match(*node.parts[i], text, at, [&, i](std::size_t to) { return in_turn(node, i + 1, text, to, then); });
  }

  // Classes are counted in a loop, so that a long run takes no stack; groups go back one by one.
  static bool again(const Node& node, const Chars& text, std::size_t at, const Then& then) {
    const Node& inner = *node.parts[0];
    if (inner.kind == Kind::one_of) {
      std::size_t count = 0;
      while (count < node.most && at + count < text.size() && fits(inner, text[at + count])) ++count;
      if (count < node.least) return false;
      if (node.possessive) return then(at + count);
      for (std::size_t n = count + 1; n-- > node.least;)
        if (then(at + n)) return true;
      return false;
    }
    return group_again(node, text, at, 0, then);
  }

  static bool group_again(const Node& node, const Chars& text, std::size_t at, std::size_t count, const Then& then) {
    if (count < node.most && count < 1000) {
      const bool more = match(*node.parts[0], text, at, [&, at, count](std::size_t to) {
        return to != at && group_again(node, text, to, count + 1, then);
      });
      if (more) return true;
    }
    return count >= node.least && then(at);
  }

  Chars text_;
  std::size_t at_ = 0;
  Made root_;
};
